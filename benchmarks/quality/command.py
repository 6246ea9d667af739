"""`python -m benchmarks quality`: side networks against QLoRA at equal compute and equal memory, run by run.

A run's row is appended as it ends; started again, the command goes on behind the rows that are there. Two at once need
results files of their own. --small is the shipped backbone, the docstring task, every method with two learning rates
(six minutes on two cores of an EPYC, Zen 5) and the neighbours of the best (by five of eleven, some six more).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.quality.backbones import SHIPPED, SIZES
from benchmarks.quality.figures import draw_all
from benchmarks.quality.grid import Grid, next_runs
from benchmarks.quality.methods import METHODS, find_method
from benchmarks.quality.rows import Row, append_row, drop_torn_line, read_rows
from benchmarks.quality.run import Bench, run_together
from benchmarks.quality.summary import cells, scalings, table
from benchmarks.quality.tasks import TASKS
from benchmarks.results import RESULTS_FOLDER

EXIT_USAGE = 2
CACHE = Path.home() / ".cache" / "ladder-quality"

FULL = Grid(
    sizes=(SHIPPED, "0.8M", "1.3M"),
    tasks=("docstring", "prose", "hops", "classify", "hops_steps"),
    methods=tuple(METHODS),
    rates=3,
    seeds=3,
    budgets=(0.25e12, 0.5e12, 1e12, 2e12),
    steps=60,
    variants=(
        *(f"xladder:num_taps={taps}" for taps in (1, 2, 6)),  # 4 is its default beside 8 blocks
        *(f"rejoin:rejoin={share}" for share in (0.25, 0.75)),
        *(f"rejoin:{change}" for change in ("connection=ladder", "num_taps=1", "merge=sum")),
    ),
)
"""1e12 FLOPs are some 60 steps of QLoRA with rank 16 on the docstring task beside the shipped backbone."""
SMALL = replace(
    FULL, sizes=(SHIPPED,), tasks=("docstring",), rates=2, seeds=1, budgets=(0.5e12,), steps=None, variants=()
)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns 0, or 2 for an argument or a results file that cannot be used."""
    options = _parser().parse_args(arguments)
    logging.disable_progress_bar()  # of loading weights, once a run
    try:
        grid = _grid(options)
        _check_places(options)
        bench = Bench(options.cache, _device(options.device))
        if drop_torn_line(options.out):
            print(f"{options.out}: the last line was cut off, so its run is done again", flush=True)
        rows = run_grid(grid, bench, options.out, options.minutes)
        if not rows:
            return 0
        print(table(rows))
        if options.json is not None:
            write_summary(options.json, rows)
        print("\n".join(f"drawn: {path}" for path in draw_all(rows, options.out.parent)))
    except (OSError, ModuleNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def run_grid(grid: Grid, bench: Bench, out: Path, minutes: float | None = None) -> list[Row]:
    """Do what the grid lacks until it is complete, or no run is begun any more because the minutes are over.

    Returns:
        all rows of the file.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    rows = read_rows(out)
    while runs := next_runs(grid, rows):
        if deadline is not None and time.monotonic() >= deadline:
            print(f"{minutes:g} minutes are over; the same command goes on from here", flush=True)
            break
        for row in run_together(runs, bench):
            append_row(out, row)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    run, spent = row.run, "in a sweep" if row.seconds is None else f"{row.seconds:.0f} s"
    return (
        f"{run.method} {run.size} {run.task} {run.budget} lr {run.learning_rate:g} seed {run.seed}: "
        f"loss {row.curve[0][1]:.4f} -> {row.loss:.4f}, {row.steps} steps, {spent}"
    )


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Means and spreads by cell, and the fits, as one JSON object."""
    summary = {
        "cells": [asdict(cell) for cell in cells(rows)],
        "scaling": [asdict(scaling) for scaling in scalings(rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("--small", action="store_true", help="the short grid; what follows changes it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"of {', '.join(SIZES)}; the first in depth")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}; the first in depth")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)}, or NAME:SETTING=VALUE,..."
    )
    parser.add_argument("--seeds", type=int, help="for what is reported")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write means, spreads and fits")
    parser.add_argument(
        "--out", type=Path, metavar="CSV", default=RESULTS_FOLDER / "quality.csv", help="default: %(default)s"
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help="of pretrained backbones; default: %(default)s"
    )
    return parser


def _grid(options: argparse.Namespace) -> Grid:
    """The named grid with what the options replace, refused before anything is trained."""
    grid = SMALL if options.small else FULL
    named = {name: tuple(value) for name in ("sizes", "tasks", "methods") if (value := getattr(options, name))}
    grid = replace(grid, **named)
    for option, known in (("sizes", SIZES), ("tasks", TASKS)):
        if unknown := [name for name in getattr(grid, option) if name not in known]:
            raise ValueError(f"--{option} {unknown[0]}: expected some of {', '.join(known)}")
    for method in grid.methods:
        find_method(method).check_fits(SIZES[grid.sizes[0]].layers)
    if options.minutes is not None and not 0 <= options.minutes < math.inf:
        raise ValueError(f"--minutes {options.minutes:g}: expected a number of at least 0")
    if options.seeds is not None:
        if options.seeds < 1:
            raise ValueError(f"--seeds {options.seeds}: expected at least 1")
        grid = replace(grid, seeds=options.seeds)
    return grid


def _check_places(options: argparse.Namespace) -> None:
    """Refuse, before anything is trained, what could not be written after it."""
    places = {"--out": options.out, "--json": options.json}
    for option, path in ((option, path) for option, path in places.items() if path is not None):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            if path.exists():
                path.open("ab").close()
        except OSError as error:
            raise ValueError(f"{option} {path}: expected a file that can be written: {error}") from error
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--cache {options.cache}: expected a folder, or where one can be made: {error}") from error


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA device, torch finds none; use --device cpu")
    return torch.device(name)
