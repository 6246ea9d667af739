"""The registry through pytest-benchmark: `pytest benchmarks --benchmark-only [-k "nf4_linear and m16"]`.

The plain test run does not collect this file (`testpaths`). Times only: memory, ratios within a run, the foreign-load
check and the CSV are `python -m benchmarks`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.registry import Benchmark, Case, Context, Implementation, load_benchmarks

_ROUNDS = 5

_ENTRIES = [
    pytest.param(benchmark, case, implementation, id=f"{benchmark.name}-{case.name}-{implementation.name}")
    for benchmark in load_benchmarks().values()
    for case in (*benchmark.cases, benchmark.toy)
    if "cpu" in case.devices
    for implementation in benchmark.implementations
    if "cpu" in implementation.devices
]


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A scratch folder that all entries share, so that a checkpoint is written once."""
    folder: Path = tmp_path_factory.mktemp("benchmark")
    return Context(torch.device("cpu"), folder)


@pytest.mark.parametrize(("entry", "case", "implementation"), _ENTRIES)
def test_speed(
    benchmark: BenchmarkFixture, context: Context, entry: Benchmark, case: Case, implementation: Implementation
) -> None:
    if entry.prepare is not None:
        entry.prepare(case, context)
    runnable = implementation.build(case, context)
    benchmark.group = f"{entry.name}-{case.name}"
    try:
        benchmark.pedantic(runnable.call, rounds=_ROUNDS, warmup_rounds=1)
    finally:
        runnable.close()
