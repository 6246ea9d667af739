"""Everything that needs a GPU, in one command: `python -m benchmarks gpu --out DIR`.

Kernel tests, memory checker, microbenchmarks and training steps run one after another, each in a process of its own
with its own time limit, so that one that fails or hangs costs nothing but itself. DIR gets `rows.csv` (all rows, as of
`python -m benchmarks NAME`), `run.log` (all output) and `summary.md`. `--dry-run` runs the same parts on a CPU at toy
shapes; its rows are marked and its summary claims nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu_summary import Outcome, summary
from benchmarks.provenance import provenance
from benchmarks.results import check_header, read_csv

# Planned seconds of each part, in order; a part may run until its planned end, so what earlier parts save is its own.
SECONDS = {
    "tests": 100,
    "memcheck": 45,
    "convert": 25,
    "nf4_linear": 50,
    "elementwise": 20,
    "linear_cross_entropy": 25,
    "side_layer": 50,
    "backbone_pass": 35,
    "train_step": 100,
    "streamed_step": 25,
    "memory_limit": 55,
}
LIMIT_SECONDS = 540
DRY_RUN_MARK = "dry_run"
EXIT_FAILED = 1
EXIT_USAGE = 2
_ROOT = Path(__file__).resolve().parent.parent
# Toy shapes: a second thread only waits for the first, and compiling takes longer than all the rest.
_DRY_RUN_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
_DRY_RUN_PATIENCE = 3  # the plan is that of a GPU; a busy CPU may take longer to import what it needs
_SANITIZER = "compute-sanitizer"
_TEST_PROCESSES = 8
_TAIL_LINES = 15
_FAILURE_LINES = 40


@dataclass(frozen=True)
class Part:
    """One step of the run.

    Attributes:
        name: a key of `SECONDS`.
        command: what to run, from the root of the source tree.
        seconds: planned duration.
        environment: variables set for it.
        absent: why it cannot run here; empty where it can.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a part failed, ran out of time, or left something out; 2 for a wrong argument.
    """
    options = _parser().parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("error: expected a CUDA device, torch finds none; --dry-run runs on a CPU", file=sys.stderr)
        return EXIT_USAGE
    options.out.mkdir(parents=True, exist_ok=True)
    csv = (options.out / "rows.csv").resolve()
    if csv.exists():
        check_header(csv)
    earlier = len(read_csv(csv)) if csv.exists() else 0
    with (options.out / "run.log").open("ab") as log:
        steps = parts(csv, options.dry_run)
        if options.dry_run:
            steps = [dataclasses.replace(step, seconds=_DRY_RUN_PATIENCE * step.seconds) for step in steps]
        outcomes = run_parts(steps, log)
    rows = read_csv(csv)[earlier:] if csv.exists() else []
    facts = provenance(torch.device("cpu" if options.dry_run else "cuda"))
    text = summary(facts, outcomes, rows, options.dry_run)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return EXIT_FAILED if any(outcome.failed for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for rows.csv, run.log, summary.md"
    )
    parser.add_argument("--dry-run", action="store_true", help="the same parts on a CPU, at toy shapes")
    return parser


def parts(csv: Path, dry_run: bool) -> list[Part]:
    """The parts in order, cheap and telling ones first."""

    def benchmark(
        part: str, names: Sequence[str], *cases: str, extra: Sequence[str] = (), seconds: float = 2.0
    ) -> Part:
        device = ("--device", "cpu" if dry_run else "cuda")
        what = ("--cases", "toy", "--seconds", "0") if dry_run else ("--cases", *cases, "--seconds", str(seconds))
        report = ("--out", str(csv), "--keep-going", *(("--mark", DRY_RUN_MARK) if dry_run else ()))
        command = (sys.executable, "-m", "benchmarks", *names, *device, *what, *report, *extra)
        return Part(part, command, SECONDS[part], _DRY_RUN_ENVIRONMENT if dry_run else {})

    fewer = ("--implementations", "ladder", "qlora") if dry_run else ()
    return [
        _tests(dry_run),
        _memcheck(dry_run),
        benchmark("convert", ("dequantize_nf4", "quantize_nf4"), "Qwen2.5-7B-*"),
        benchmark("nf4_linear", ("nf4_linear",), "Qwen2.5-7B-layer-*", seconds=1.5),
        benchmark("elementwise", ("rms_norm", "rotary", "swiglu"), "*", seconds=1.0),
        benchmark("linear_cross_entropy", ("linear_cross_entropy",), "Qwen2.5-7B-*"),
        benchmark("side_layer", ("side_layer",), "Qwen2.5-7B-*"),
        benchmark("backbone_pass", ("backbone_pass",), "Qwen2.5-7B-*", seconds=5.0),
        benchmark("train_step", ("train_step",), "Qwen2.5-0.5B-t2048", "Qwen2.5-7B-t2048", extra=fewer, seconds=10.0),
        benchmark("streamed_step", ("streamed_step",), "Qwen2.5-7B-*", seconds=5.0),
        benchmark("memory_limit", ("memory_limit",), "Qwen2.5-*", seconds=1.0),
    ]


def _tests(dry_run: bool) -> Part:
    """`pytest -m gpu`; a dry run collects all of it and runs the determinism test."""
    files = [str(path.relative_to(_ROOT)) for path in sorted((_ROOT / "tests").glob("test_gpu_*.py"))]
    # Verbose, so that the log names what failed even where time runs out before pytest's own summary.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", *files]
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic products
    if dry_run:
        command += ["-k", "determinism"]
        environment |= _DRY_RUN_ENVIRONMENT
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_TEST_PROCESSES)]  # most of the time Triton compiles, on the CPU
    absent = "" if importlib.util.find_spec("pytest") is not None else "pytest is not installed"
    return Part("tests", tuple(command), SECONDS["tests"], environment, absent)


def _memcheck(dry_run: bool) -> Part:
    """Every op at its toy shapes under compute-sanitizer; a dry run does without the tool."""
    command = (sys.executable, "-m", "benchmarks.toys", "--device", "cpu" if dry_run else "cuda")
    if dry_run:
        return Part("memcheck", command, SECONDS["memcheck"], _DRY_RUN_ENVIRONMENT)
    tool = shutil.which(_SANITIZER) or shutil.which(_SANITIZER, path="/usr/local/cuda/bin")
    if tool is None:
        return Part("memcheck", command, SECONDS["memcheck"], absent=f"{_SANITIZER} is not installed")
    # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = (tool, "--tool", "memcheck", "--error-exitcode", "9", *command)
    return Part("memcheck", checked, SECONDS["memcheck"], environment)


def run_parts(steps: Sequence[Part], log: IO[bytes]) -> list[Outcome]:
    """Run the parts one after another, whatever becomes of them.

    Args:
        steps: in order; each may run until the sum of the planned seconds up to its own.
        log: takes all output.
    """
    outcomes = []
    planned_end = time.monotonic()
    for step in steps:
        planned_end += step.seconds
        print(f"{step.name}: until {step.seconds:.0f} s are used up", file=sys.stderr, flush=True)
        # Never less than its own seconds: where this process itself was held up, that is no fault of the part.
        outcomes.append(_run_part(step, max(step.seconds, planned_end - time.monotonic()), log))
        print(f"{step.name}: {outcomes[-1].status}", file=sys.stderr, flush=True)
    return outcomes


def _run_part(step: Part, limit_seconds: float, log: IO[bytes]) -> Outcome:
    if step.absent:
        return Outcome(step.name, "absent", step.seconds, 0.0, step.absent)
    log.write(f"\n===== {step.name}: {' '.join(step.command)}\n".encode())
    log.flush()
    begin, start = log.tell(), time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment)
    process = subprocess.Popen(
        step.command, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = _status_of(process.wait(limit_seconds))
    except subprocess.TimeoutExpired:
        status = "timed out"
    finally:
        _end_group(process)
    return Outcome(step.name, status, step.seconds, time.monotonic() - start, _telling_lines(log, begin))


def _status_of(returncode: int) -> str:
    """What an exit status of ours means; 3 and 4 are those of `python -m benchmarks`."""
    return {0: "passed", 3: "passed, other processes took CPU time"}.get(returncode, f"failed with {returncode}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what the part has left: its own processes are in a group of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _telling_lines(log: IO[bytes], begin: int) -> str:
    """Lines that report a failure, and the last lines, of what was logged since `begin`."""
    log.flush()
    with open(log.name, "rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    failures = [line for line in lines[:-_TAIL_LINES] if "FAILED" in line]
    return "\n".join([*failures[:_FAILURE_LINES], *lines[-_TAIL_LINES:]])
