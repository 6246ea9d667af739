"""What rows say together: mean and spread over seeds at the best learning rate, and how the loss scales."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.quality.rows import Row, parsed_budget
from benchmarks.quality.scaling import Fit, Interval, fit, intervals


@dataclass(frozen=True)
class Cell:
    """A method on a task beside a backbone at a budget, over the seeds of its best learning rate.

    Attributes:
        learning_rate: the one of most seeds that did not diverge, and of those the one of the lowest mean loss.
        seeds, diverged: how many did not and did; everything else is of those that did not.
        loss, lowest, highest: mean and extremes over the seeds.
        flops, peak_bytes, accuracy: means over them.
        seconds: mean over those that were trained alone; None without any.
    """

    method: str
    size: str
    task: str
    budget: str
    learning_rate: float
    seeds: int
    diverged: int
    loss: float
    lowest: float
    highest: float
    flops: float
    seconds: float | None
    peak_bytes: int
    peak_bytes_checkpointing: int | None
    accuracy: dict[str, float]


def cells(rows: Sequence[Row]) -> list[Cell]:
    """One for every method, size, task and budget, in the order of the rows, without those that only diverged."""
    groups: dict[tuple[str, str, str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        run = row.run
        groups[run.method, run.size, run.task, run.budget][run.learning_rate].append(row)
    return [cell for by_rate in groups.values() if (cell := _best_cell(list(by_rate.values()))) is not None]


def _best_cell(by_rate: Sequence[Sequence[Row]]) -> Cell | None:
    """Of the rows of each learning rate."""
    split = [([row for row in rows if math.isfinite(row.loss)], len(rows)) for rows in by_rate]
    kept = [(rows, count - len(rows)) for rows, count in split if rows]
    if not kept:
        return None
    return _cell(*min(kept, key=lambda each: (-len(each[0]), fmean(row.loss for row in each[0]))))


def _cell(rows: Sequence[Row], diverged: int) -> Cell:
    run, losses = rows[0].run, [row.loss for row in rows]
    groups = dict.fromkeys(group for row in rows for group in row.accuracy)
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return Cell(
        method=run.method,
        size=run.size,
        task=run.task,
        budget=run.budget,
        learning_rate=run.learning_rate,
        seeds=len(rows),
        diverged=diverged,
        loss=fmean(losses),
        lowest=min(losses),
        highest=max(losses),
        flops=fmean(row.flops for row in rows),
        seconds=fmean(seconds) if seconds else None,
        peak_bytes=rows[0].peak_bytes,
        peak_bytes_checkpointing=rows[0].peak_bytes_checkpointing,
        accuracy={group: fmean(row.accuracy[group] for row in rows if group in row.accuracy) for group in groups},
    )


@dataclass(frozen=True)
class Scaling:
    """How a method's loss falls with compute on a task, at the best size of every budget.

    Attributes:
        sizes: of backbones that were trained at those budgets.
        flops, losses: of every seed's training at the best size.
    """

    method: str
    task: str
    sizes: tuple[str, ...]
    flops: list[float]
    losses: list[float]
    fit: Fit
    intervals: dict[str, Interval]


def scalings(rows: Sequence[Row]) -> list[Scaling]:
    """Of every method and task with three budgets and more than three trainings at their best sizes."""
    found = []
    by_method: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells(rows):
        if flops_of(cell.budget) is not None:
            by_method[cell.method, cell.task].append(cell)
    for (method, task), own in by_method.items():
        best = [min((c for c in own if c.budget == b), key=lambda c: c.loss) for b in sorted({c.budget for c in own})]
        trained = [row for cell in best for row in rows if _is_of(row, cell) and math.isfinite(row.loss)]
        flops, losses = [row.flops for row in trained], [row.loss for row in trained]
        if len(best) < 3 or len(set(flops)) < 3 or len(trained) < 4:
            continue
        sizes = tuple(dict.fromkeys(cell.size for cell in own))
        found.append(Scaling(method, task, sizes, flops, losses, fit(flops, losses), intervals(flops, losses)))
    return found


def _is_of(row: Row, cell: Cell) -> bool:
    run = row.run
    return (run.method, run.size, run.task, run.budget, run.learning_rate) == (
        cell.method, cell.size, cell.task, cell.budget, cell.learning_rate,
    )  # fmt: skip


def flops_of(budget: str) -> float | None:
    """The FLOPs of a budget that counts them."""
    kind, amount = parsed_budget(budget)
    return amount if kind == "flops" else None


def table(rows: Sequence[Row]) -> str:
    """The cells as text, the lowest loss of each size, task and budget first."""
    lines = []
    found = cells(rows)
    for key in dict.fromkeys((cell.size, cell.task, cell.budget) for cell in found):
        lines.append(f"\n{key[1]}, backbone of {key[0]}, {key[2]}")
        own = [cell for cell in found if (cell.size, cell.task, cell.budget) == key]
        for cell in sorted(own, key=lambda cell: cell.loss):
            seconds = "" if cell.seconds is None else f", {cell.seconds:.0f} s"
            diverged = f", {cell.diverged} more diverged" if cell.diverged else ""
            accuracy = f", right {fmean(cell.accuracy.values()):.3f}" if cell.accuracy else ""
            lines.append(
                f"  {cell.method:<22} loss {cell.loss:.4f} "
                f"({cell.lowest:.4f} to {cell.highest:.4f}, {cell.seeds} seeds{diverged}), "
                f"lr {cell.learning_rate:g}, {cell.flops:.3g} FLOPs, {cell.peak_bytes / 2**20:.1f} MiB"
                f"{seconds}{accuracy}"
            )
    for scaling in scalings(rows):
        parts = (
            f"{name} {getattr(scaling.fit, name):.4g} ({interval.low:.4g} to {interval.high:.4g})"
            for name, interval in scaling.intervals.items()
        )
        lines.append(f"\n{scaling.task}, {scaling.method}: L(C) = B / C^lambda + E with {', '.join(parts)}")
    return "\n".join(lines)
