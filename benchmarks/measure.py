"""Interleaved timing and memory of all implementations of a case.

Every implementation is built, then called twice, which warms it up and shows its memory; then all take turns, one call
each, the order rotating from round to round, until the time budget is spent. So a ratio compares calls made within the
same seconds, and each call finds the caches as another implementation left them, as a weight of a real model does.

On a GPU a call is timed between two events, after a write that empties the L2. The events are queued behind that write,
which takes a card 60 to 700 us: host time up to there is hidden, so one kernel is timed bare, and what launches many
is timed with the gaps that its host leaves, unless the case asks for a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.cuda_graph import captured
from benchmarks.kernels_path import count_triton_launches
from benchmarks.memory import MemoryMeter
from benchmarks.provenance import foreign_load_percent, read_cpu_times
from benchmarks.registry import Benchmark, Case, Context, Implementation, Runnable, find_benchmark

MIN_ROUNDS = 3
MAX_ROUNDS = 1000
SMALLEST_DIVISOR_MIB = 1.0
_TOY_CALLS = 2
FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2


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
        failures: implementations that could not be measured, each with its reason.
    """

    benchmark: Benchmark
    case: Case
    measurements: tuple[Measurement, ...]
    foreign_percent: float | None
    failures: tuple[tuple[str, str], ...] = ()


class Runner(Protocol):
    """Something that runs one implementation, call by call, here or in another process."""

    @property
    def prepared(self) -> Prepared:
        """Built and called twice, with what that showed; the first access does it."""

    def time_call_ms(self) -> float:
        """Duration of one call."""

    def close(self) -> None:
        """Release everything."""


class LocalRunner:
    """Runs an implementation in this process."""

    def __init__(self, benchmark: Benchmark, case: Case, implementation: Implementation, context: Context) -> None:
        self._device = context.device
        self._arguments = (benchmark, case, implementation, context)
        self._runnable: Runnable | None = None
        self._flush: Tensor | None = None

    @cached_property
    def prepared(self) -> Prepared:
        """Built and called twice, by the first access."""
        benchmark, case, implementation, context = self._arguments
        _load_code(benchmark, implementation, context)
        meter = MemoryMeter(context.device)
        meter.settle()
        before = meter.current_mib()
        self._runnable = implementation.build(case, context)
        meter.settle()
        built = meter.current_mib()
        meter.reset_peak()
        self._call_twice(case.graphed or implementation.graphed)
        self._synchronize()
        peak = meter.peak_mib()
        return Prepared(
            peak - built,
            peak - before,
            self._runnable.bytes_moved,
            self._runnable.details,
            self._runnable.kernels,
        )

    def _call_twice(self, graphed: bool) -> None:
        """The calls whose memory is measured; on a GPU also the place to see what is launched, and to capture."""
        assert self._runnable is not None
        with count_triton_launches() as count:
            self._runnable.call()
        if self._device.type == "cuda":
            if self._runnable.kernels:
                self._runnable = dataclasses.replace(self._runnable, kernels=count.path())
            if graphed:
                self._runnable = captured(self._runnable)
        self._runnable.call()

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
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self._device)
        self._flush.zero_()
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
            self._runnable = self._flush = None


def _load_code(benchmark: Benchmark, implementation: Implementation, context: Context) -> None:
    """Let libraries load what they will need, so that it does not count as memory of the case.

    On a CPU the toy case does. Allocated bytes of a GPU hold no code, only the workspace of its first matrix product;
    the toy would compile kernels that nobody times.
    """
    if context.device.type == "cuda":
        square = torch.ones(64, 64, dtype=torch.float16, device=context.device)
        torch.mm(square, square)
        return
    toy = implementation.build(benchmark.toy, context)
    for _ in range(_TOY_CALLS):
        toy.call()
    toy.close()


class WorkerRunner:
    """Runs an implementation in a fresh process of its own, which sleeps while others run.

    The process starts, and imports, at once; it builds when `prepared` is first asked for.
    """

    def __init__(self, benchmark: Benchmark, case: Case, implementation: Implementation, context: Context) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, benchmark.name, case.name, implementation.name, context, torch.get_num_threads())
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    @cached_property
    def prepared(self) -> Prepared:
        """Built and called twice, by the first access."""
        self._connection.send("prepare")
        prepared = self._receive()
        assert isinstance(prepared, Prepared)
        return prepared

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
    """Worker process: on the first request build and report memory, then one call per request until the pipe closes."""
    torch.set_num_threads(threads)
    try:
        benchmark = find_benchmark(benchmark_name)
        try:
            connection.recv()
        except EOFError:
            return
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


def measure_case(
    benchmark: Benchmark, case: Case, context: Context, seconds: float, keep_going: bool = False
) -> CaseResult:
    """Build, warm up, measure memory, then time all implementations of a case in turns.

    Args:
        benchmark: the entry; `isolated` decides whether every implementation gets its own process.
        case: one of its cases.
        context: device and scratch folder.
        seconds: budget of the timing phase, which runs for at least `MIN_ROUNDS` rounds whatever they take.
        keep_going: name an implementation that fails in `CaseResult.failures` and measure the others.

    Raises:
        RuntimeError: with `keep_going`, no implementation is left.
    """
    if benchmark.prepare is not None:
        for needed in (benchmark.toy, case):
            benchmark.prepare(needed, context)
    runner_class = WorkerRunner if benchmark.isolated else LocalRunner
    ready: dict[Implementation, Runner] = {}
    failures: list[tuple[str, str]] = []
    with ExitStack() as stack:
        runners: dict[Implementation, Runner] = {}
        for implementation in benchmark.implementations:
            if context.device.type in implementation.devices:
                runners[implementation] = runner_class(benchmark, case, implementation, context)
                stack.callback(runners[implementation].close)
        for implementation, runner in runners.items():
            try:
                _ = runner.prepared
            except Exception as error:
                if not keep_going:
                    raise
                failures.append((implementation.name, "".join(traceback.format_exception(error))))
                continue
            ready[implementation] = runner
            print(f"{case.name}: {implementation.name} is ready", file=sys.stderr, flush=True)
        if not ready:
            raise RuntimeError("\n".join(f"{name} failed: {reason}" for name, reason in failures))
        before = read_cpu_times()
        samples = interleave(list(ready.values()), seconds)
        foreign_percent = foreign_load_percent(before, read_cpu_times())
        measurements = tuple(
            Measurement(implementation, runner.prepared, values)
            for (implementation, runner), values in zip(ready.items(), samples, strict=True)
        )
    return CaseResult(benchmark, case, measurements, foreign_percent, tuple(failures))


def speed_ratio(ours: Measurement, other: Measurement) -> float:
    """How many times faster `ours` is, by the medians: the quotient of two `p50_ms` columns of one run."""
    return other.percentile_ms(50) / ours.percentile_ms(50)


def memory_ratio(ours: Measurement, other: Measurement) -> float | None:
    """Memory growth of `ours` as a share of the other's; None where the other's is too small to divide by (1 MiB)."""
    if other.prepared.step_mib < SMALLEST_DIVISOR_MIB:
        return None
    return ours.prepared.step_mib / other.prepared.step_mib
