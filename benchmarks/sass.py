"""`python -m benchmarks sass`: what every GPU kernel compiles to on every architecture, without a GPU.

Rows say how many registers a thread takes, whether any are spilled, what the main loop consists of and which resource
of a card it keeps busy for longest. These are facts about machine code and a model of its use, not timings.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib.metadata
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import RESULTS_FOLDER
from benchmarks.sass_model import CARDS

SASS_CSV = RESULTS_FOLDER / "sass.csv"
IDENTITY = ("name", "architecture", "triton", "key", "uses_tensor_cores")
MEASURED = (
    "registers", "spill_bytes", "local_accesses", "shared_bytes", "threads", "loop_instructions", "loop_tensor",
    "loop_mix", "instructions_per_weight", "lookup_wavefronts", "bound",
)  # fmt: skip
COLUMNS = IDENTITY + MEASURED
WORKERS = 2
# Beyond the instructions of a dense product, nested scales included: what hides beside the tensor pipe at 128 tokens.
WEIGHT_BUDGETS = {86: 5.2, 89: 5.2, 90: 6.5}
REGRESSION = 1.05
EXIT_VIOLATION = 1
EXIT_USAGE = 2

Row = dict[str, str]


class Job(NamedTuple):
    """One kernel configuration on one architecture, and the hash of what is compiled."""

    name: str
    architecture: int
    key: str
    kernel: str


def unavailable() -> str | None:
    """Why nothing can be compiled in this process; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "sass: expected Triton, which is not installed; pip install triton (Linux only)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "sass: expected Triton's compiler, got TRITON_INTERPRET=1, which replaces it; unset the variable"
    return None


def jobs(patterns: Sequence[str] | None = None) -> list[Job]:
    """Every kernel configuration on every architecture, or those whose "name" or "name@86" matches a pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    from benchmarks import sass_compile

    found = [
        Job(spec.name, architecture, sass_compile.source_key(spec), spec.kernel.__name__)
        for spec in sass_compile.all_specs().values()
        for architecture in spec.architectures
    ]
    if patterns is None:
        return found

    def matches(job: Job, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in (job.name, f"{job.name}@{job.architecture}"))

    for pattern in patterns:
        if not any(matches(job, pattern) for job in found):
            raise ValueError(f"--cases: {pattern!r} matches no kernel configuration")
    return [job for job in found if any(matches(job, pattern) for pattern in patterns)]


def measure_all(wanted: Sequence[Job], report: Callable[[Row], None]) -> list[Row]:
    """Compile the jobs in worker processes, reporting each row as it is there."""
    rows = []
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(min(WORKERS, max(1, len(wanted))), mp_context=context) as pool:
        for row in pool.map(measure_job, wanted):
            report(row)
            rows.append(row)
    return rows


def measure_job(job: Job) -> Row:
    """The row of one job."""
    from benchmarks import sass_compile

    spec = sass_compile.all_specs()[job.name]
    identity = (job.name, str(job.architecture), triton_version(), job.key, "yes" if spec.uses_tensor_cores else "")
    return dict(zip(IDENTITY, identity, strict=True)) | sass_compile.measure(spec, job.architecture)


def triton_version() -> str:
    """Version of the installed Triton."""
    return importlib.metadata.version("triton")


def split_known(wanted: Sequence[Job], known: Iterable[Row]) -> tuple[list[Row], list[Job]]:
    """Rows of an earlier run that still hold, and jobs left to compile.

    A row holds if its Triton and the hash of its source are today's. Of every kernel one configuration is compiled
    nevertheless, on an architecture that depends on its name, so that rows can be seen to be reproducible.
    """
    rows = {(row["name"], row["architecture"]): row for row in known if row["triton"] == triton_version()}
    again = {job.kernel: job for job in sorted(wanted, key=lambda job: (len(job.name) * job.architecture) % 97)}
    kept, left = [], []
    for job in wanted:
        row = rows.get((job.name, str(job.architecture)))
        if row is None or row["key"] != job.key or again[job.kernel] == job:
            left.append(job)
        else:
            kept.append(row)
    return kept, left


def violations(row: Mapping[str, str]) -> list[str]:
    """What a row breaks of the rules for shipped kernels, each as one sentence."""
    architecture, where = int(row["architecture"]), f"{row['name']} on sm_{row['architecture']}"
    found = []
    if int(row["spill_bytes"]) or int(row["local_accesses"]):
        found.append(f"{where}: spills, {row['spill_bytes']} bytes and {row['local_accesses']} accesses")
    limit = CARDS[architecture].shared_bytes
    if int(row["shared_bytes"]) > limit:
        found.append(f"{where}: {row['shared_bytes']} bytes of shared memory, expected at most {limit}")
    if row["uses_tensor_cores"]:
        if not int(row["loop_tensor"]):
            found.append(f"{where}: no tensor-core instruction in the main loop")
        budget = WEIGHT_BUDGETS.get(architecture)
        if row["instructions_per_weight"] and budget and float(row["instructions_per_weight"]) > budget:
            found.append(
                f"{where}: {row['instructions_per_weight']} instructions per weight, expected at most {budget}"
            )
    return found


def regressions(rows: Iterable[Mapping[str, str]], baseline: Iterable[Mapping[str, str]]) -> list[str]:
    """Main loops that are more than 5 percent longer than in the same Triton's row of a baseline."""
    before = {(row["name"], row["architecture"], row["triton"]): int(row["loop_instructions"]) for row in baseline}
    found = []
    for row in rows:
        old = before.get((row["name"], row["architecture"], row["triton"]))
        new = int(row["loop_instructions"])
        if old is not None and new > REGRESSION * old:
            found.append(f"{row['name']} on sm_{row['architecture']}: main loop of {new} instructions, was {old}")
    return found


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, none where there is no file.

    Raises:
        ValueError: it has another header.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the header {','.join(COLUMNS)}; delete the file to write a new one")
        return list(reader)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows sorted by name, architecture and Triton version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["name"], int(row["architecture"]), row["triton"])))


def merge(old: Iterable[Row], new: Sequence[Row], is_complete: bool) -> list[Row]:
    """Old rows, replaced where measured again; a complete run also drops what its Triton no longer compiles."""
    measured = {(row["name"], row["architecture"], row["triton"]) for row in new}
    version = triton_version()
    kept = [
        row
        for row in old
        if (row["name"], row["architecture"], row["triton"]) not in measured
        and not (is_complete and row["triton"] == version)
    ]
    return [*kept, *new]


def line(row: Mapping[str, str]) -> str:
    """One row as text."""
    weight = f" {row['instructions_per_weight']}/weight" if row["instructions_per_weight"] else ""
    banks = f" {row['lookup_wavefronts']}-way look-ups" if row["lookup_wavefronts"] else ""
    return (
        f"sm_{row['architecture']:<4}{row['name']:<56} {row['registers']:>3} registers "
        f"{row['spill_bytes']:>5} spilled {row['shared_bytes']:>6} shared  loop {row['loop_instructions']:>5}, "
        f"{row['loop_tensor']} tensor{weight}{banks}  bound: {row['bound']}  ({row['loop_mix']})"
    )


def run(patterns: Sequence[str] | None, out: Path, known: Path | None) -> int:
    """Compile, print and write; the number of violations, each of which is printed.

    Args:
        patterns: as in `jobs`.
        out: file to write; what else is in it stays.
        known: a file whose unchanged rows are taken instead of compiling them again.

    Raises:
        ValueError: nothing can be compiled here, a pattern matches nothing, or a file has another header.
    """
    if (reason := unavailable()) is not None:
        raise ValueError(reason)
    earlier = read_rows(out)
    wanted = jobs(patterns)
    kept, left = ([], list(wanted)) if known is None else split_known(wanted, read_rows(known))
    print(f"{len(left)} to compile, {len(kept)} unchanged", flush=True)
    rows = kept + measure_all(left, lambda row: print(line(row), flush=True))
    write_rows(out, merge(earlier, rows, is_complete=patterns is None))
    problems = [problem for row in rows for problem in violations(row)]
    print("\n".join([f"\n{len(rows)} rows in {out}, {len(problems)} violations", *problems]))
    return len(problems)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a kernel breaks a rule; 2 for a wrong argument, or where nothing can be compiled.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks sass", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help='"name" or "name@86", wildcards allowed')
    parser.add_argument("--out", type=Path, default=SASS_CSV, metavar="CSV")
    parser.add_argument("--known", type=Path, metavar="CSV", help="take rows of unchanged kernels from this file")
    options = parser.parse_args(arguments)
    try:
        return EXIT_VIOLATION if run(options.cases, options.out, options.known) else 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
