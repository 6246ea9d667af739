"""Figures, drawn from a results file and from nothing else: `python -m benchmarks.plot [CSV] [--out FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import RESULTS_FOLDER, read_csv

_COLORS = {"ours": "#1b6ca8", "baseline": "#b0b0b0"}
_DPI = 150


def latest_run(rows: Sequence[dict[str, str]], case: str | None = None) -> list[dict[str, str]]:
    """Rows of the newest clean run, of one case where it is named.

    Rows marked for foreign load are no evidence and are never drawn.

    Raises:
        ValueError: no clean row is left.
    """
    clean = [row for row in rows if not row["mark"] and row["case"] == (case or row["case"])]
    if not clean:
        raise ValueError(
            f"expected at least one unmarked row{f' of case {case!r}' if case else ''}, got none among {len(rows)}; "
            "run the benchmark again on an idle machine"
        )
    newest = max(clean, key=lambda row: row["date"])
    return [row for row in clean if (row["date"], row["case"]) == (newest["date"], newest["case"])]


def draw_train_step(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Two bar charts of one run: tokens per second and memory growth of a step, each with its ratios to the best QLoRA.

    Args:
        rows: of one run and case, as `latest_run` returns them.
        path: the picture; its suffix chooses the format (png or svg).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    baselines = [row for row in rows if row["kind"] == "baseline"]
    fastest = max(float(row["tokens_per_second"]) for row in baselines)
    leanest = min(float(row["step_mib"]) for row in baselines)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.55 * len(rows) + 1.8), sharey=True)
    panels = (
        (axes[0], "tokens_per_second", "tokens per second (more is better)", fastest, "fastest QLoRA"),
        (axes[1], "step_mib", "memory growth of a step, MiB (less is better)", leanest, "leanest QLoRA"),
    )
    names = [row["impl"] for row in rows]
    for axis, column, title, best, best_name in panels:
        values = [float(row[column]) for row in rows]
        bars = axis.barh(names, values, color=[_COLORS[row["kind"]] for row in rows])
        texts = [
            f"{value:.0f}" + (f"  ({value / best:.2f} x {best_name})" if row["kind"] == "ours" else "")
            for row, value in zip(rows, values, strict=True)
        ]
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.45)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    first = rows[0]
    place = first["cpu"] if first["device"] == "cpu" else first["device"]
    caption = (
        f"{first['case']}, {place}, {first['threads']} threads, torch {first['torch']}, commit {first['commit'][:10]}"
    )
    figure.text(0.01, 0.01, f"{caption}, {first['date']}", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the newest clean run of `train_step`.

    Returns:
        0, or 2 after an error that the message explains.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, default=RESULTS_FOLDER / "train_step.csv")
    parser.add_argument("--case", help="default: the case of the newest clean run")
    parser.add_argument("--out", type=Path, help="default: beside the CSV, as .png")
    options = parser.parse_args(arguments)
    out = options.csv.with_suffix(".png") if options.out is None else options.out
    try:
        draw_train_step(latest_run(read_csv(options.csv), options.case), out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
