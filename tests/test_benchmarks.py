"""The benchmark harness: rows carry their origin, ratios are what they say, foreign load is noticed."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import __main__ as command_line
from benchmarks import kernels_path, measure, plot, provenance, results
from benchmarks.memory import MemoryMeter, _ResidentSampler
from benchmarks.provenance import CpuTimes
from benchmarks.registry import (
    TOY,
    Benchmark,
    Case,
    Context,
    Implementation,
    Runnable,
    find_benchmark,
    load_benchmarks,
)

FACTS = {"date": "2026-01-02T03:04:05+00:00", "device": "cpu", "cpu": "test cpu", "threads": "1", "commit": "0" * 40}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toy problems: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(torch.device("cpu"), tmp_path_factory.mktemp("benchmark"))


def _measurement(name: str, kind: str, samples: tuple[float, ...], step_mib: float) -> measure.Measurement:
    implementation = Implementation(name, lambda case, context: Runnable(lambda: None), kind)  # type: ignore[arg-type]
    kernels = "reference" if kind == "ours" else ""
    return measure.Measurement(implementation, measure.Prepared(step_mib, 2 * step_mib, None, "", kernels), samples)


@pytest.fixture
def result() -> measure.CaseResult:
    """Ours takes 2 ms and 10 MiB; the rivals 6 ms and 40 MiB, 4 ms and 80 MiB, the bound 1 ms and nothing."""
    measurements = (
        _measurement("ours", "ours", (1.0, 2.0, 3.0), 10.0),
        _measurement("slow", "baseline", (6.0, 5.0, 9.0), 40.0),
        _measurement("fat", "baseline", (4.0, 4.0, 4.0), 80.0),
        _measurement("bound", "bound", (1.0, 1.0, 1.0), 0.0),
    )
    case = Case("case", {"m": 2, "n": 3}, torch.float32, flops=4_000_000_000, bytes_moved=6_000_000, tokens=100)
    implementations = tuple(m.implementation for m in measurements)
    benchmark = Benchmark("fake", "", (case,), replace(case, name=TOY), implementations, isolated=True)
    return measure.CaseResult(benchmark, case, measurements, foreign_percent=1.5)


def test_a_worker_process_reports_and_times() -> None:
    benchmark = find_benchmark("linear_cross_entropy")
    runner = measure.WorkerRunner(
        benchmark, benchmark.toy, benchmark.implementations[0], Context(torch.device("cpu"), Path())
    )
    assert runner.prepared.kernels == kernels_path.kernels_path(torch.device("cpu"))
    assert runner.time_call_ms() > 0
    assert runner.prepared.build_and_step_mib >= runner.prepared.step_mib >= 0
    runner.close()
    assert not multiprocessing.active_children()


def test_a_worker_process_hands_its_error_over() -> None:
    benchmark = find_benchmark("train_step")
    runner = measure.WorkerRunner(
        benchmark,
        benchmark.toy,
        benchmark.implementation("ladder"),
        Context(torch.device("cpu"), Path("no-such-folder")),
    )
    with pytest.raises(RuntimeError, match=r"train_step/toy/ladder failed(?s:.*)no-such-folder"):
        _ = runner.prepared
    runner.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_nobody_asks_ends_quietly() -> None:
    benchmark = find_benchmark("linear_cross_entropy")
    runner = measure.WorkerRunner(
        benchmark, benchmark.toy, benchmark.implementations[0], Context(torch.device("cpu"), Path())
    )
    runner.close()
    assert not multiprocessing.active_children()


def _faulty(names: tuple[str, ...]) -> Benchmark:
    def fails(case: Case, context: Context) -> Runnable:
        raise ModuleNotFoundError("No module named 'rival'")

    implementations = tuple(
        Implementation(name, fails if name in names else lambda case, context: Runnable(lambda: None))
        for name in ("ours", "rival")
    )
    return Benchmark("fake", "", (), Case(TOY, {}, torch.float32), implementations)


def test_a_failing_rival_is_named_and_the_rest_measured(context: Context) -> None:
    benchmark = _faulty(("rival",))
    with pytest.raises(ModuleNotFoundError):
        measure.measure_case(benchmark, benchmark.toy, context, 0.0)
    result = measure.measure_case(benchmark, benchmark.toy, context, 0.0, keep_going=True)
    assert [m.implementation.name for m in result.measurements] == ["ours"]
    ((name, reason),) = result.failures
    assert name == "rival" and "No module named 'rival'" in reason


def test_a_case_of_which_nothing_is_left_fails(context: Context) -> None:
    benchmark = _faulty(("ours", "rival"))
    with pytest.raises(RuntimeError, match=r"ours failed(?s:.*)rival failed(?s:.*)No module named 'rival'"):
        measure.measure_case(benchmark, benchmark.toy, context, 0.0, keep_going=True)


def test_implementations_are_measured_on_their_devices_only(context: Context) -> None:
    benchmark = _faulty(())
    ours, rival = benchmark.implementations
    benchmark = replace(benchmark, implementations=(ours, replace(rival, devices=("cuda",))))
    result = measure.measure_case(benchmark, benchmark.toy, context, 0.0)
    assert [m.implementation.name for m in result.measurements] == ["ours"]


class _FakeRunner:
    """Remembers when it was called."""

    prepared = measure.Prepared(0.0, 0.0, None, "", "")

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def time_call_ms(self) -> float:
        self._log.append(self._name)
        return float(len(self._log))

    def close(self) -> None:
        raise AssertionError("whoever opens a runner closes it")


def test_turns_rotate_and_samples_stay_with_their_runner() -> None:
    log: list[str] = []
    samples = measure.interleave([_FakeRunner(name, log) for name in "abc"], seconds=0.0, min_rounds=3)
    assert "".join(log) == "abcbcacab"
    assert samples == [(1.0, 6.0, 8.0), (2.0, 4.0, 9.0), (3.0, 5.0, 7.0)]


def test_rounds_stop_at_the_maximum_and_reach_the_minimum() -> None:
    for seconds, expected in ((0.0, 2), (3600.0, 5)):
        (samples,) = measure.interleave([_FakeRunner("a", [])], seconds, min_rounds=2, max_rounds=5)
        assert len(samples) == expected


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20), st.floats(0, 100))
def test_percentiles_are_numpys(samples: list[float], percent: float) -> None:
    import numpy as np

    measurement = _measurement("x", "ours", tuple(samples), 1.0)
    assert measurement.percentile_ms(percent) == pytest.approx(float(np.percentile(samples, percent)), rel=1e-12)


def test_memory_growth_of_a_call_is_its_peak_and_excludes_the_inputs(context: Context) -> None:
    mib = 64

    def build(case: Case, _: Context) -> Runnable:
        held = torch.ones(case.sizes["mib"] * 2**18)
        return Runnable(lambda: (held + 1).sum(), details=str(len(held)))

    case = Case("big", {"mib": mib})
    implementation = Implementation("x", build)
    benchmark = Benchmark("m", "", (case,), Case(TOY, {"mib": 1}), (implementation,))
    runner = measure.LocalRunner(benchmark, case, implementation, context)
    assert runner.prepared.step_mib == pytest.approx(mib, abs=4)
    assert runner.prepared.build_and_step_mib == pytest.approx(2 * mib, abs=4)
    assert runner.time_call_ms() > 0
    runner.close()


def test_memory_meter_sees_a_peak_that_is_gone() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    meter.settle()
    before = meter.current_mib()
    meter.reset_peak()
    torch.ones(50 * 2**18)
    assert meter.peak_mib() - before == pytest.approx(50, abs=4)
    assert meter.current_mib() - before < 10


def test_the_sampling_fallback_sees_memory_that_stays_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.memory._reset_high_water_mark", lambda: False)
    meter = MemoryMeter(torch.device("cpu"))
    meter.settle()
    before = meter.current_mib()
    meter.reset_peak()
    assert isinstance(meter._sampler, _ResidentSampler)
    held = torch.ones(50 * 2**18)
    assert meter.peak_mib() - before == pytest.approx(50, abs=4)
    assert held[0] == 1


def test_ratios(result: measure.CaseResult) -> None:
    ours, slow, fat, bound = result.measurements
    assert measure.speed_ratio(ours, slow) == 3.0
    assert measure.speed_ratio(ours, fat) == 2.0
    assert measure.speed_ratio(ours, bound) == 0.5
    assert measure.memory_ratio(ours, slow) == 0.25
    assert measure.memory_ratio(ours, bound) is None


def test_metrics_have_the_units_they_name(result: measure.CaseResult) -> None:
    values = results.metrics(result, result.measurements[0])
    assert values == {
        "p20_ms": pytest.approx(1.4),
        "p50_ms": 2.0,
        "p80_ms": pytest.approx(2.6),
        "samples": 3.0,
        "step_mib": 10.0,
        "build_and_step_mib": 20.0,
        "tokens_per_second": pytest.approx(50_000.0),
        "gb_s": pytest.approx(3.0),
        "tflop_s": pytest.approx(2.0),
    }
    assert set(values) == set(results.UNITS)


def test_csv_rows(result: measure.CaseResult) -> None:
    ours, slow, *_ = results.csv_rows(result, FACTS)
    assert tuple(ours) == results.COLUMNS
    assert ours["speed_ratios"] == "slow=3 fat=2 bound=0.5"
    assert ours["memory_ratios"] == "slow=0.25 fat=0.125"
    assert (ours["sizes"], ours["dtype"], ours["mark"], ours["samples"]) == ("m=2 n=3", "fp32", "", "3")
    assert (ours["kernels"], slow["kernels"]) == ("reference", "")
    assert slow["speed_ratios"] == "fat=0.6667 bound=0.1667"
    assert ours["commit"] == FACTS["commit"]


def test_a_mark_of_the_caller_goes_before_that_of_the_load(result: measure.CaseResult) -> None:
    assert {row["mark"] for row in results.csv_rows(result, FACTS, "dry_run")} == {"dry_run"}


def test_csv_is_appended_with_one_header(result: measure.CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "new" / "fake.csv"
    rows = results.csv_rows(result, FACTS)
    results.append_csv(path, rows)
    first = path.read_bytes()
    results.append_csv(path, rows)
    assert path.read_bytes().startswith(first)
    assert results.read_csv(path) == rows + rows


def test_csv_with_another_header_is_refused_and_left_alone(result: measure.CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("benchmark,case,time\nx,y,1\n")
    with pytest.raises(
        ValueError, match=r"other\.csv: expected the header benchmark,case,model.*got benchmark,case,time"
    ):
        results.append_csv(path, results.csv_rows(result, FACTS))
    assert path.read_text() == "benchmark,case,time\nx,y,1\n"


def test_json_rows(result: measure.CaseResult, tmp_path: Path) -> None:
    results.write_json(tmp_path / "rows.json", [result, result])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 4 * len(results.UNITS)
    for row in rows:
        assert set(row) == {"benchmark", "case", "impl", "metric", "value", "unit", "ratios", "mark"}
        assert isinstance(row["value"], float) and row["unit"] == results.UNITS[row["metric"]]
    found = {row["metric"]: row for row in rows if row["impl"] == "ours"}
    assert found["tokens_per_second"]["ratios"] == {"slow": 3.0, "fat": 2.0, "bound": 0.5}
    assert found["step_mib"]["ratios"] == {"slow": 0.25, "fat": 0.125}
    assert found["p50_ms"]["ratios"]["slow"] == pytest.approx(1 / 3)
    assert found["samples"]["ratios"] == {}


def test_table_quotes_the_fastest_and_the_leanest(result: measure.CaseResult) -> None:
    text = results.table(result)
    assert "ours [reference]" in text
    assert "ours / slow: 3.00 x the speed, 0.25 x the memory growth" in text
    assert "ours / fastest (fat), leanest (slow): 2.00 x the speed, 0.25 x the memory growth" in text


def test_provenance_names_everything() -> None:
    facts = provenance.provenance(torch.device("cpu"))
    assert set(facts) | {"mark", "foreign_cpu_percent"} <= set(results.COLUMNS)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == "1"
    assert facts["bitsandbytes"] and facts["peft"] and facts["transformers"] and facts["cpu"] and facts["date"]
    assert facts["commit"] == "unknown" or len(facts["commit"]) == 40
    assert facts["dirty"] in ("yes", "no", "unknown")


@pytest.mark.parametrize(
    ("busy", "own", "percent", "mark"),
    [
        (100, 100, 0.0, ""),
        (100, 90, 5.0, ""),
        (100, 88, 6.0, "foreign_load"),
        (50, 60, 0.0, ""),
        (200, 0, 100.0, "foreign_load"),
    ],
)
def test_foreign_load(busy: int, own: int, percent: float, mark: str) -> None:
    before = CpuTimes(total=1000, busy=300, own=20)
    after = CpuTimes(total=1200, busy=300 + busy, own=20 + own)
    assert provenance.foreign_load_percent(before, after) == percent
    assert provenance.mark_of(percent) == mark


def test_unmeasured_load_is_marked_too() -> None:
    assert provenance.foreign_load_percent(None, CpuTimes(1, 1, 1)) is None
    assert provenance.mark_of(None) == "load_unknown"


def test_cpu_times_count_descendants_and_not_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text("cpu  100 10 50 800 7 3 2 5 0 0\ncpu0 ...\n")
    stat = "{pid} (a b) c) S {parent} 0 0 0 0 0 0 0 0 0 {user} {system} {child_user} {child_system} 0\n"
    processes = ((1, 0, 1000), (40, 1, 1), (41, 40, 10), (42, 41, 100), (50, 1, 5000))
    for pid, parent, ticks in processes:
        (tmp_path / str(pid)).mkdir()
        text = stat.format(pid=pid, parent=parent, user=ticks, system=ticks, child_user=ticks, child_system=0)
        (tmp_path / str(pid) / "stat").write_text(text)
    monkeypatch.setattr("os.getpid", lambda: 40)
    assert provenance.read_cpu_times(tmp_path) == CpuTimes(total=977, busy=170, own=3 * 111)
    assert provenance.read_cpu_times(tmp_path / "absent") is None


def test_own_work_is_not_foreign() -> None:
    times = provenance.read_cpu_times()
    assert times is not None
    code = "s = 0\nfor i in range(4_000_000): s += i"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = provenance.read_cpu_times()
    assert after is not None and after.own - times.own >= 5


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, foreign: float | None, *arguments: str) -> int:
    monkeypatch.setattr(measure, "foreign_load_percent", lambda before, after: foreign)
    out = ("--out", str(tmp_path / "out.csv"), "--json", str(tmp_path / "out.json"))
    return command_line.main(["linear_cross_entropy", "--cases", TOY, "--seconds", "0", *out, *arguments])


def test_command_line_appends_and_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, tmp_path, 0.0) == 0
    assert _run(monkeypatch, tmp_path, 0.0) == 0
    rows = results.read_csv(tmp_path / "out.csv")
    assert [row["impl"] for row in rows] == ["ladder_kernels", "torch_full_logits", "two_gemms"] * 2
    assert {row["samples"] for row in rows} == {str(measure.MIN_ROUNDS)}
    assert {row["mark"] for row in rows} == {""}
    output = capsys.readouterr().out
    assert "ladder_kernels / torch_full_logits" in output
    assert kernels_path.kernels_notice(torch.device("cpu")) in output
    assert json.loads((tmp_path / "out.json").read_text())[0]["benchmark"] == "linear_cross_entropy"


def test_command_line_marks_a_loaded_run_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, tmp_path, 37.0) == command_line.EXIT_FOREIGN_LOAD
    rows = results.read_csv(tmp_path / "out.csv")
    assert len(rows) == 3
    assert {(row["mark"], row["foreign_cpu_percent"]) for row in rows} == {("foreign_load", "37.0")}
    assert "other processes took 37% of the CPU, more than 5%" in capsys.readouterr().err
    assert {row["mark"] for row in json.loads((tmp_path / "out.json").read_text())} == {"foreign_load"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "unknown benchmark 'no_such'; expected one of: nf4_linear"),
        (["nf4_linear", "--cases", "m3*"], "'m3*' matches no case of nf4_linear"),
    ],
)
def test_command_line_explains_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == command_line.EXIT_USAGE
    assert message in capsys.readouterr().err


def test_command_line_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["list"]) == 0
    listing = capsys.readouterr().out
    for benchmark in load_benchmarks().values():
        assert f"{benchmark.name}: {benchmark.summary}" in listing


def test_cases_are_selected_by_device_or_by_pattern() -> None:
    benchmark = find_benchmark("train_step")
    names = [case.name for case in command_line.select_cases(benchmark, "cpu", None)]
    assert names == ["Qwen2.5-0.5B-v32000-t512"]
    assert TOY not in [case.name for case in command_line.select_cases(benchmark, "cpu", ["*"])]
    assert [case.name for case in command_line.select_cases(benchmark, "cpu", [TOY])] == [TOY]


def test_the_reference_is_never_called_native(monkeypatch: pytest.MonkeyPatch) -> None:
    from ladder_kernels import native

    absent = native.NativeStatus("reference", None, None, "no library")
    monkeypatch.setattr(native, "status", lambda: absent)
    assert kernels_path.kernels_path(torch.device("cpu")) == "reference"
    loaded = native.NativeStatus("native", Path("lib"), "avx512", "loaded lib")
    monkeypatch.setattr(native, "status", lambda: loaded)
    assert kernels_path.kernels_path(torch.device("cpu")) == "native avx512"
    assert kernels_path.kernels_path(torch.device("cuda")) == "reference"


def test_triton_is_only_said_of_kernels_that_were_seen() -> None:
    knobs = pytest.importorskip("triton.knobs")
    with kernels_path.count_triton_launches() as count:
        assert count.path() == "reference"
        for _ in range(2):
            knobs.runtime.launch_enter_hook(None)
    knobs.runtime.launch_enter_hook(None)
    assert count.path() == "triton, 2 launches"


def _train_step_csv(result: measure.CaseResult, path: Path) -> None:
    for date, mark, factor in (("2026-01-01", "", 1), ("2026-01-02", "", 2), ("2026-01-03", "foreign_load", 3)):
        rows = results.csv_rows(result, FACTS | {"date": date, "torch": "2.13"})
        for row in rows:
            row |= {"mark": mark, "tokens_per_second": str(100 * factor)}
        results.append_csv(path, [row for row in rows if row["kind"] != "bound"])


def test_figures_come_from_the_newest_clean_run(result: measure.CaseResult, tmp_path: Path) -> None:
    path = tmp_path / "train_step.csv"
    _train_step_csv(result, path)
    rows = plot.latest_run(results.read_csv(path))
    assert {row["date"] for row in rows} == {"2026-01-02"} and len(rows) == 3
    assert plot.main([str(path)]) == 0
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_not_drawn_from_marked_rows(
    result: measure.CaseResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train_step.csv"
    results.append_csv(path, results.csv_rows(replace(result, foreign_percent=50.0), FACTS))
    assert plot.main([str(path)]) == 2
    assert "expected at least one unmarked row, got none among 4" in capsys.readouterr().err
    assert not (tmp_path / "train_step.png").exists()
