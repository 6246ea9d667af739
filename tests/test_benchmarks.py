"""The benchmark command: what it runs, where its rows come from, what it says of foreign load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import kernels_path, measure, provenance, results
from benchmarks.provenance import CpuTimes
from benchmarks.registry import TOY, find_benchmark, load_benchmarks

pytestmark = pytest.mark.usefixtures("one_thread")


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
