"""Figures of a results file and of nothing else: `python -m benchmarks.quality.figures CSV [--out FOLDER]`.

Points are means over seeds at each method's best learning rate, bars the smallest and largest seed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.backbones import SIZES
from benchmarks.quality.rows import Row, read_rows
from benchmarks.quality.summary import Cell, Scaling, cells, flops_of, scalings

COLORS = {
    "ladder": "#1b6ca8", "xladder": "#0b3d63", "rejoin": "#2a8c4a", "lst": "#5fa8d3", "qst": "#9ccbe8",
    "qlora_r8": "#c8c8c8", "qlora_r16": "#8a8a8a", "qlora_r64": "#5a5a5a",
    "qlora_r16_checkpointing": "#2b2b2b",
    "lora_top_half": "#d39b5f", "lora_top_quarter": "#a8651b",
}  # fmt: skip
_DPI = 150
_CHARACTERS_PER_INCH = 17  # of the caption


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure for which there are rows, as png files of one name each."""
    drawn = []
    for name, draw in _FIGURES.items():
        figure = draw(rows)
        if figure is not None:
            _caption(figure, rows)
            folder.mkdir(parents=True, exist_ok=True)
            drawn.append(folder / f"quality_{name}.png")
            figure.savefig(drawn[-1], dpi=_DPI)
            plt.close(figure)
    return drawn


def cost_figure(rows: Sequence[Row]) -> Figure | None:
    """Held-out loss of the first size and task against FLOPs, peak memory and wall time."""
    found = [cell for cell in cells(rows) if ":" not in cell.method and flops_of(cell.budget)]
    if not found:
        return None
    first = found[0]
    found = [cell for cell in found if (cell.size, cell.task) == (first.size, first.task)]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), sharey=True)
    panels: tuple[tuple[str, Callable[[Cell], float | None]], ...] = (
        ("training FLOPs", lambda cell: cell.flops),
        ("peak memory of a step, MiB (hollow: checkpointing)", lambda cell: cell.peak_bytes / 2**20),
        ("seconds of training", lambda cell: cell.seconds),
    )
    for axis, (label, value) in zip(axes, panels, strict=True):
        for method in dict.fromkeys(cell.method for cell in found):
            _line(axis, [cell for cell in found if cell.method == method], value, method)
        _logarithmic(axis, label)
    for cell in found:
        if cell.peak_bytes_checkpointing is not None:
            axes[1].plot(cell.peak_bytes_checkpointing / 2**20, cell.loss, "o", mfc="none", color=_color(cell.method))
    axes[0].set_ylabel("held-out loss, nats per token")
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{first.task}, backbone of {first.size}", fontsize=11)
    return figure


def isoflop_figure(rows: Sequence[Row]) -> Figure | None:
    """Loss over the backbone's size at each budget, one panel per method, and the fitted L(C) of each."""
    found = [cell for cell in cells(rows) if flops_of(cell.budget) and ":" not in cell.method]
    fitted = [scaling for scaling in scalings(rows) if len(scaling.sizes) > 1]
    if not fitted:
        return None
    figure, axes = plt.subplots(1, len(fitted) + 1, figsize=(4.2 * (len(fitted) + 1), 4.6), sharey=True)
    for axis, scaling in zip(axes, fitted, strict=False):
        own = [cell for cell in found if (cell.method, cell.task) == (scaling.method, scaling.task)]
        for budget in sorted({cell.budget for cell in own}, key=lambda budget: flops_of(budget) or 0):
            line = sorted((cell for cell in own if cell.budget == budget), key=lambda cell: parameters_of(cell.size))
            axis.plot([parameters_of(cell.size) for cell in line], [cell.loss for cell in line], "o-", label=budget)
        _logarithmic(axis, "backbone parameters")
        axis.set_title(scaling.method)
        axis.legend(fontsize=7, frameon=False)
    for scaling in fitted:
        _fitted_line(axes[-1], scaling)
    _logarithmic(axes[-1], "training FLOPs")
    axes[-1].set_title("L(C) = B / C^lambda + E, best size")
    axes[-1].legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("held-out loss, nats per token")
    return figure


def delta_figure(rows: Sequence[Row]) -> Figure | None:
    """xladder over delta, its tapped blocks, beside ladder: a panel for each task."""
    found = [cell for cell in cells(rows) if flops_of(cell.budget)]
    varied = [cell for cell in found if cell.method.startswith("xladder:num_taps=")]
    places = list(dict.fromkeys((cell.size, cell.task, cell.budget) for cell in varied))
    if not places:
        return None
    figure, axes = plt.subplots(1, len(places), figsize=(5.2 * len(places), 4.4), squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        own = [cell for cell in found if (cell.size, cell.task, cell.budget) == place]
        variants = {delta: cell for cell in own if (delta := _delta(cell)) is not None}
        deltas = sorted(variants)
        _errorbar(axis, deltas, [variants[delta] for delta in deltas], "xladder", "xladder")
        for cell in (cell for cell in own if cell.method == "ladder"):
            axis.axhline(cell.loss, color=_color("ladder"), label="ladder")
            axis.axhspan(cell.lowest, cell.highest, color=_color("ladder"), alpha=0.15)
        axis.set_title(", ".join(place), fontsize=10)
        axis.set_xlabel("delta, tapped blocks")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("held-out loss, nats per token")
    return figure


def _delta(cell: Cell) -> int | None:
    """Tapped blocks of an xladder of which nothing else was changed; by default half of the blocks."""
    if cell.method == "xladder":
        return SIZES[cell.size].layers // 2
    delta = cell.method.removeprefix("xladder:num_taps=")
    return int(delta) if delta.isdecimal() else None


def accuracy_figure(rows: Sequence[Row]) -> Figure | None:
    """Accuracy by group of examples, one panel per task."""
    found = [cell for cell in cells(rows) if cell.accuracy and flops_of(cell.budget)]
    tasks = list(dict.fromkeys(cell.task for cell in found))
    if not tasks:
        return None
    figure, axes = plt.subplots(len(tasks), 1, figsize=(11, 3.6 * len(tasks)), squeeze=False)
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        own = [cell for cell in found if cell.task == task]
        groups = sorted({group for cell in own for group in cell.accuracy})
        lines = defaultdict(lambda: itertools.cycle(("-", "--", ":", "-.")))  # of a method and its variants
        for cell in own:
            values, color = [cell.accuracy.get(group, float("nan")) for group in groups], _color(cell.method)
            axis.plot(range(len(groups)), values, "o", ls=next(lines[color]), color=color, label=cell.method)
        axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=7)
        axis.set(ylabel="share of right answers", ylim=(0, 1.02), title=task)
        axis.legend(fontsize=7, frameon=False)
    return figure


_FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "cost": cost_figure,
    "isoflop": isoflop_figure,
    "delta": delta_figure,
    "accuracy": accuracy_figure,
}


def parameters_of(size: str) -> float:
    """A size's name, such as "3.0M", as a number."""
    return float(size.removesuffix("M")) * 1e6


def _line(axis: Axes, found: Sequence[Cell], value: Callable[[Cell], float | None], method: str) -> None:
    placed = [(place, cell) for cell in found if (place := value(cell)) is not None]
    placed.sort(key=lambda pair: pair[1].flops)
    _errorbar(axis, [place for place, _ in placed], [cell for _, cell in placed], method, method)


def _errorbar(axis: Axes, places: Sequence[float], found: Sequence[Cell], method: str, label: str) -> None:
    losses = [cell.loss for cell in found]
    below = [cell.loss - cell.lowest for cell in found]
    above = [cell.highest - cell.loss for cell in found]
    options: dict[str, Any] = {"color": _color(method), "label": label, "marker": "o", "markersize": 4, "capsize": 2}
    axis.errorbar(places, losses, yerr=[below, above], **options)
    axis.spines[["top", "right"]].set_visible(False)


def _logarithmic(axis: Axes, label: str) -> None:
    axis.set(xscale="log", xlabel=label)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=7, labelrotation=30)


def _fitted_line(axis: Axes, scaling: Scaling) -> None:
    color, slope = _color(scaling.method), scaling.intervals["slope"]
    axis.plot(scaling.flops, scaling.losses, "o", color=color, markersize=4)
    line = sorted(set(scaling.flops))
    text = f"{scaling.method}: lambda {scaling.fit.slope:.3f} ({slope.low:.3f} to {slope.high:.3f})"
    axis.plot(line, [scaling.fit.loss(flops) for flops in line], color=color, label=text)


def _color(method: str) -> str:
    return COLORS[method.partition(":")[0]]


def _caption(figure: Figure, rows: Sequence[Row]) -> None:
    facts = rows[-1].facts
    places = sorted({row.facts["cpu" if row.facts["device"] == "cpu" else "device"] for row in rows})
    commits = sorted({row.facts["commit"][:7] for row in rows})
    text = f"{len(rows)} trainings, {', '.join(places)}, torch {facts['torch']}, "
    text += f"commit {', '.join(commits)}, {facts['date']}"
    lines = textwrap.wrap(text, round(_CHARACTERS_PER_INCH * figure.get_figwidth()))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.03 * len(lines), 1, 0.98))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the file has rows for; returns 0, or 2 after an error that the message explains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.figures", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder; default: the CSV's")
    options = parser.parse_args(arguments)
    try:
        if not options.csv.is_file():
            raise ValueError(f"expected a results file, there is none at {options.csv}")
        drawn = draw_all(read_rows(options.csv), options.csv.parent if options.out is None else options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, drawn)) or f"{options.csv}: no rows that a figure could be drawn from")
    return 0


if __name__ == "__main__":
    sys.exit(main())
