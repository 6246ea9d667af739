"""Measuring: worker processes, interleaved rounds, percentiles, memory growth."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernels_path, measure
from benchmarks.memory import MemoryMeter, _ResidentSampler
from benchmarks.registry import (
    TOY,
    Benchmark,
    Case,
    Context,
    Implementation,
    Runnable,
    find_benchmark,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(torch.device("cpu"), tmp_path_factory.mktemp("benchmark"))


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
