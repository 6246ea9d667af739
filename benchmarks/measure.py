"""Interleaved timing and memory of all implementations of a case.

Every implementation is built, then called twice, which warms it up and shows its memory; then all take turns, one call
each, the order rotating from round to round, until the time budget is spent. So a ratio compares calls made within the
same seconds, and each call finds the caches as another implementation left them, as a weight of a real model does.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from benchmarks.memory import MemoryMeter
from benchmarks.provenance import foreign_load_percent, read_cpu_times
from benchmarks.registry import Benchmark, Case, Context, Implementation, Runnable, find_benchmark

MIN_ROUNDS = 3
MAX_ROUNDS = 1000
SMALLEST_DIVISOR_MIB = 1.0
_MEMORY_CALLS = 2
_FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2


@dataclass(frozen=True)
class Prepared:
    """What is known of an implementation before it is timed.

    Attributes:
        step_mib: peak memory during the first two calls above that after building: outputs, scratch, gradients,
            optimizer state, caches that grow once.
        build_and_step_mib: the same peak above the memory before building, so with weights and inputs.
        bytes_moved, details, kernels: see `registry.Runnable`.
    """

    step_mib: float
    build_and_step_mib: float
    bytes_moved: int | None
    details: str
    kernels: str


@dataclass(frozen=True)
class Measurement:
    """One implementation's result on one case, times in milliseconds."""

    implementation: Implementation
    prepared: Prepared
    samples_ms: tuple[float, ...]

    def percentile_ms(self, percent: float) -> float:
        """Linear-interpolated percentile of the samples."""
        ordered = sorted(self.samples_ms)
        position = (len(ordered) - 1) * percent / 100
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class CaseResult:
    """All implementations of a case, measured in one run.

    Attributes:
        foreign_percent: share of all cores that other processes took during the timing; None where unknown.
    """

    benchmark: Benchmark
    case: Case
    measurements: tuple[Measurement, ...]
    foreign_percent: float | None


class Runner(Protocol):
    """Something that runs one implementation, call by call, here or in another process."""

    prepared: Prepared

    def time_call_ms(self) -> float:
        """Duration of one call."""

    def close(self) -> None:
        """Release everything."""


class LocalRunner:
    """Runs an implementation in this process."""

    def __init__(self, benchmark: Benchmark, case: Case, implementation: Implementation, context: Context) -> None:
        self._device = context.device
        toy = implementation.build(benchmark.toy, context)
        for _ in range(_MEMORY_CALLS):
            toy.call()
        toy.close()
        del toy
        meter = MemoryMeter(context.device)
        meter.settle()
        before = meter.current_mib()
        self._runnable: Runnable | None = implementation.build(case, context)
        meter.settle()
        built = meter.current_mib()
        meter.reset_peak()
        for _ in range(_MEMORY_CALLS):
            self._runnable.call()
        self._synchronize()
        peak = meter.peak_mib()
        self.prepared = Prepared(
            peak - built,
            peak - before,
            self._runnable.bytes_moved,
            self._runnable.details,
            self._runnable.kernels,
        )

    def time_call_ms(self) -> float:
        """Duration of one call; on a GPU with a flushed L2 and by its own clock."""
        if self._device.type == "cuda":
            return self._time_cuda_call_ms()
        assert self._runnable is not None
        start = time.perf_counter_ns()
        self._runnable.call()
        return (time.perf_counter_ns() - start) / 1e6

    def _time_cuda_call_ms(self) -> float:
        assert self._runnable is not None
        torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self._device).zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._runnable.call()
        end.record()
        self._synchronize()
        return start.elapsed_time(end)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Drop inputs, weights and outputs."""
        if self._runnable is not None:
            self._runnable.close()
            self._runnable = None


class WorkerRunner:
    """Runs an implementation in a fresh process of its own, which sleeps while others run."""

    def __init__(self, benchmark: Benchmark, case: Case, implementation: Implementation, context: Context) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, benchmark.name, case.name, implementation.name, context, torch.get_num_threads())
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        prepared = self._receive()
        assert isinstance(prepared, Prepared)
        self.prepared = prepared

    def time_call_ms(self) -> float:
        """Duration of one call, measured inside the worker."""
        self._connection.send("time")
        duration = self._receive()
        assert isinstance(duration, float)
        return duration

    def close(self) -> None:
        """End the worker."""
        self._connection.close()
        self._process.join()

    def _receive(self) -> object:
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a benchmark process ended with exit code {self._process.exitcode}; -9 means that memory ran out"
            ) from None
        if isinstance(message, Exception):
            raise message
        return message


def _serve(
    connection: Connection, benchmark_name: str, case_name: str, name: str, context: Context, threads: int
) -> None:
    """Worker process: build, report memory, then one call per request until the pipe closes."""
    torch.set_num_threads(threads)
    try:
        benchmark = find_benchmark(benchmark_name)
        runner = LocalRunner(benchmark, benchmark.case(case_name), benchmark.implementation(name), context)
        connection.send(runner.prepared)
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            connection.send(runner.time_call_ms())
    except Exception:
        connection.send(RuntimeError(f"{benchmark_name}/{case_name}/{name} failed:\n{traceback.format_exc()}"))


def interleave(
    runners: Sequence[Runner], seconds: float, min_rounds: int = MIN_ROUNDS, max_rounds: int = MAX_ROUNDS
) -> list[tuple[float, ...]]:
    """Samples in milliseconds of each runner, as many for each: rounds of one call each until `seconds` have passed."""
    samples: list[list[float]] = [[] for _ in runners]
    deadline = time.monotonic() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.monotonic() < deadline):
        for turn in range(len(runners)):
            position = (turn + rounds) % len(runners)
            samples[position].append(runners[position].time_call_ms())
        rounds += 1
    return [tuple(values) for values in samples]


def measure_case(benchmark: Benchmark, case: Case, context: Context, seconds: float) -> CaseResult:
    """Build, warm up, measure memory, then time all implementations of a case in turns.

    Args:
        benchmark: the entry; `isolated` decides whether every implementation gets its own process.
        case: one of its cases.
        context: device and scratch folder.
        seconds: budget of the timing phase, which runs for at least `MIN_ROUNDS` rounds whatever they take.
    """
    if benchmark.prepare is not None:
        for needed in (benchmark.toy, case):
            benchmark.prepare(needed, context)
    runner_class = WorkerRunner if benchmark.isolated else LocalRunner
    runners: list[Runner] = []
    with ExitStack() as stack:
        for implementation in benchmark.implementations:
            runner = runner_class(benchmark, case, implementation, context)
            stack.callback(runner.close)
            runners.append(runner)
            print(f"{case.name}: {implementation.name} is ready", file=sys.stderr, flush=True)
        before = read_cpu_times()
        samples = interleave(runners, seconds)
        foreign_percent = foreign_load_percent(before, read_cpu_times())
    measurements = tuple(
        Measurement(implementation, runner.prepared, values)
        for implementation, runner, values in zip(benchmark.implementations, runners, samples, strict=True)
    )
    return CaseResult(benchmark, case, measurements, foreign_percent)


def speed_ratio(ours: Measurement, other: Measurement) -> float:
    """How many times faster `ours` is, by the medians: the quotient of two `p50_ms` columns of one run."""
    return other.percentile_ms(50) / ours.percentile_ms(50)


def memory_ratio(ours: Measurement, other: Measurement) -> float | None:
    """Memory growth of `ours` as a share of the other's; None where the other's is too small to divide by (1 MiB)."""
    if other.prepared.step_mib < SMALLEST_DIVISOR_MIB:
        return None
    return ours.prepared.step_mib / other.prepared.step_mib
