"""What a benchmark is: named cases, implementations that compete on them, and a toy case for the tests.

An entry module (see `ENTRY_MODULES`) declares inputs, FLOPs and bytes once; timing, memory, CSV and printing live in
the shared modules beside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

ENTRY_MODULES = (
    "benchmarks.nf4",
    "benchmarks.linear_cross_entropy",
    "benchmarks.elementwise",
    "benchmarks.side_layer",
    "benchmarks.backbone_pass",
    "benchmarks.train_step",
    "benchmarks.sweep",
    "benchmarks.memory_limit",
    "benchmarks.generate",
)
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOY = "toy"


@dataclass(frozen=True)
class Context:
    """Where a case runs.

    Attributes:
        device: every tensor of the case lives there.
        folder: scratch folder of this run, shared by all implementations; `Benchmark.prepare` writes into it.
    """

    device: torch.device
    folder: Path


@dataclass(frozen=True)
class Case:
    """One problem, the same for all implementations.

    Attributes:
        name: unique within the benchmark.
        sizes: dimensions by name, as the builders read them and as the CSV shows them.
        dtype: compute dtype; None where each implementation chooses its own (it then says so in its details).
        model: name of a shape in `benchmarks.shapes`, where the case needs a whole model.
        flops: useful floating-point operations of one call; None where implementations differ by design.
        bytes_moved: compulsory memory traffic of one call in bytes; an implementation may state its own.
        tokens: tokens of one call, for tokens per second.
        devices: device types it is meant for by default; `--cases` runs it anywhere.
        graphed: on a GPU every implementation is captured in a CUDA graph and the replay is timed, so that host time
            does not count: for problems shorter than their own launches.
    """

    name: str
    sizes: Mapping[str, int]
    dtype: torch.dtype | None = None
    model: str = ""
    flops: int | None = None
    bytes_moved: int | None = None
    tokens: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    graphed: bool = False


@dataclass(frozen=True)
class Runnable:
    """An implementation built for a case, ready to be timed.

    Attributes:
        call: one call of the operation, on prepared inputs.
        cleanup: releases what garbage collection would not.
        bytes_moved: traffic of this implementation in bytes, where it differs from the case's.
        details: what runs (dtype, path, trainable parameters), for the CSV.
        kernels: which path of ladder_kernels does the work (`benchmarks.kernels_path`); empty for a competitor. On a
            GPU the runner replaces it by what it saw launched.
    """

    call: Callable[[], object]
    cleanup: Callable[[], None] | None = None
    bytes_moved: int | None = None
    details: str = ""
    kernels: str = ""

    def close(self) -> None:
        """Release resources; the runnable must not be called afterwards."""
        if self.cleanup is not None:
            self.cleanup()


@dataclass(frozen=True)
class Implementation:
    """One competitor: `ours`, a `baseline` we are compared with, or a `bound` nobody can beat (a bare GEMM, a copy).

    `devices` are the device types it is measured on; `graphed` captures it in a CUDA graph, as `Case.graphed` does all.
    """

    name: str
    build: Callable[[Case, Context], Runnable]
    kind: Literal["ours", "baseline", "bound"] = "baseline"
    devices: tuple[str, ...] = ("cpu", "cuda")
    graphed: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A registry entry.

    Attributes:
        name: also the name of its CSV.
        summary: one line for `python -m benchmarks list`.
        cases: real problems, run by default where the device fits.
        toy: a problem of milliseconds, run by the tests and before measuring, so that loading code is not measured.
        implementations: competitors, ours first.
        isolated: every implementation gets a process of its own, so that memory of the one is not memory of the other.
        seconds: default time budget of the timing phase of one case, all implementations together.
        prepare: writes files the builders need (a random checkpoint) into `Context.folder`, once per case and run.
    """

    name: str
    summary: str
    cases: tuple[Case, ...]
    toy: Case
    implementations: tuple[Implementation, ...]
    isolated: bool = False
    seconds: float = 5.0
    prepare: Callable[[Case, Context], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for what, names in (
            ("case", [case.name for case in (*self.cases, self.toy)]),
            ("implementation", [implementation.name for implementation in self.implementations]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"benchmark {self.name!r}: every {what} needs a name of its own, got {names}")
        if self.toy.name != TOY:
            raise ValueError(f"benchmark {self.name!r}: the toy case must be named {TOY!r}, got {self.toy.name!r}")

    def case(self, name: str) -> Case:
        """The case of that name, the toy case included."""
        for case in (*self.cases, self.toy):
            if case.name == name:
                return case
        known = ", ".join(case.name for case in (*self.cases, self.toy))
        raise ValueError(f"benchmark {self.name!r} has no case {name!r}; expected one of: {known}")

    def implementation(self, name: str) -> Implementation:
        """The implementation of that name."""
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(implementation.name for implementation in self.implementations)
        raise ValueError(f"benchmark {self.name!r} has no implementation {name!r}; expected one of: {known}")


def load_benchmarks() -> dict[str, Benchmark]:
    """Every registry entry by name; importing the entry modules is all that happens."""
    entries = [entry for module in ENTRY_MODULES for entry in importlib.import_module(module).BENCHMARKS]
    return {entry.name: entry for entry in entries}


def find_benchmark(name: str) -> Benchmark:
    """The entry of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    entries = load_benchmarks()
    if name not in entries:
        raise ValueError(f"unknown benchmark {name!r}; expected one of: {', '.join(entries)}")
    return entries[name]
