"""Command line: `python -m benchmarks list`, `NAME ... [options]`, `gpu --out DIR`, `sass`, `memory` or `quality`."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu, memory_table, sass
from benchmarks.kernels_path import kernels_notice
from benchmarks.measure import CaseResult, measure_case
from benchmarks.provenance import FOREIGN_LOAD_LIMIT_PERCENT, mark_of, provenance
from benchmarks.registry import Benchmark, Case, Context, find_benchmark, load_benchmarks
from benchmarks.results import RESULTS_FOLDER, append_csv, check_header, csv_rows, table, write_json

EXIT_USAGE = 2
EXIT_FOREIGN_LOAD = 3
EXIT_FAILURES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 2 for a wrong argument or a missing competitor; 3 where other processes took too much of the CPU (rows are
        written, but marked); 4 where something failed under --keep-going (rows of the rest are written).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:
        return gpu.main(arguments[1:])
    if arguments[:1] == ["sass"]:
        return sass.main(arguments[1:])
    if arguments[:1] == ["memory"]:
        return memory_table.main(arguments[1:])
    if arguments[:1] == ["quality"]:
        return _quality(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.names == ["list"]:
        print(_listing())
        return 0
    try:
        return max(_run(find_benchmark(name), options) for name in options.names)
    except ModuleNotFoundError as error:
        return _missing(error)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _quality(arguments: Sequence[str]) -> int:
    try:
        from benchmarks.quality import command  # needs peft and matplotlib, which the others may lack
    except ModuleNotFoundError as error:
        return _missing(error)
    return command.main(arguments)


def _missing(error: ModuleNotFoundError) -> int:
    print(f"error: {error}; competitors come with `pip install -e '.[peers]'`", file=sys.stderr)
    return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="benchmarks, or `list`; `gpu`, `sass`, `memory` and `quality` have options of their own",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--cases", nargs="+", metavar="PATTERN", help="case names, wildcards allowed; default: all of this device"
    )
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help="measure these only; default: all of this device"
    )
    parser.add_argument("--seconds", type=float, help="time budget of the timing phase of a case")
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="results file to append to; default: benchmarks/results/NAME.csv"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every metric of this run as a list of objects"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="report what fails and measure the rest, instead of stopping"
    )
    parser.add_argument("--mark", default="", help="word for the column `mark`: rows with one are never drawn")
    return parser


def _listing() -> str:
    lines = []
    for benchmark in load_benchmarks().values():
        lines.append(f"{benchmark.name}: {benchmark.summary}")
        lines.append(f"  implementations: {', '.join(item.name for item in benchmark.implementations)}")
        lines += [f"  {case.name} ({', '.join(case.devices)})" for case in benchmark.cases]
    return "\n".join(lines)


def _run(benchmark: Benchmark, options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA device, torch finds none; use --device cpu")
    seconds = benchmark.seconds if options.seconds is None else options.seconds
    if options.implementations is not None:
        chosen = tuple(map(benchmark.implementation, options.implementations))
        benchmark = dataclasses.replace(benchmark, implementations=chosen)
    cases = select_cases(benchmark, device.type, options.cases)
    out = RESULTS_FOLDER / f"{benchmark.name}.csv" if options.out is None else options.out
    if out.exists():
        check_header(out)
    facts = provenance(device)
    print(" | ".join(f"{name} {value}" for name, value in facts.items() if value))
    print(kernels_notice(device), flush=True)
    results: list[CaseResult] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="ladder-benchmark-") as folder:
        for case in cases:
            try:
                result = measure_case(benchmark, case, Context(device, Path(folder)), seconds, options.keep_going)
            except Exception:
                if not options.keep_going:
                    raise
                failed = True
                print(_failure(f"{benchmark.name}/{case.name}", traceback.format_exc()), flush=True)
                continue
            append_csv(out, csv_rows(result, facts, options.mark))
            results.append(result)
            print(f"\n{table(result)}", flush=True)
            for name, reason in result.failures:
                failed = True
                print(_failure(f"{benchmark.name}/{case.name}/{name}", reason), flush=True)
    if options.json is not None:
        write_json(options.json, results)
    print(f"\nrows appended to {out}")
    verdict = _load_verdict(results)
    return EXIT_FAILURES if failed else verdict


def _failure(what: str, reason: str) -> str:
    """One line that says what failed and why, then all of the reason."""
    return f"FAILED {what}: {reason.strip().splitlines()[-1]}\n{reason}"


def select_cases(benchmark: Benchmark, device_type: str, patterns: Sequence[str] | None) -> list[Case]:
    """Cases meant for the device, or those whose names match a pattern (the toy case only by its name).

    Raises:
        ValueError: a pattern matches nothing.
    """
    if patterns is None:
        return [case for case in benchmark.cases if device_type in case.devices]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in (*benchmark.cases, benchmark.toy)):
            raise ValueError(
                f"--cases: {pattern!r} matches no case of {benchmark.name}; `python -m benchmarks list` shows them"
            )
    return [
        case
        for case in (*benchmark.cases, benchmark.toy)
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
        and (case is not benchmark.toy or case.name in patterns)
    ]


def _load_verdict(results: Sequence[CaseResult]) -> int:
    """Exit status, after saying on stderr which cases other processes have spoilt."""
    loaded = [result for result in results if mark_of(result.foreign_percent) == "foreign_load"]
    for result in loaded:
        print(
            f"{result.case.name}: other processes took {result.foreign_percent:.0f}% of the CPU, more than "
            f"{FOREIGN_LOAD_LIMIT_PERCENT:.0f}%: rows are marked, ratios mean nothing; run again on an idle machine",
            file=sys.stderr,
        )
    return EXIT_FOREIGN_LOAD if loaded else 0


if __name__ == "__main__":
    sys.exit(main())
