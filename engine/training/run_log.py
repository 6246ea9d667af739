"""What a run leaves behind to read: `metrics.jsonl`, one line per log call, and `training.png`, drawn from the same.

The lines are the Trainer's log history, which checkpoints carry: a resumed run rewrites the file from it and goes on,
so no step is there twice, and a line that a crash cut in half is gone. Nothing here can stop a training.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine.model.adapter import replace_file

METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "training.png"

_SECONDS_BETWEEN_PICTURES = 30.0  # one takes half a second: at most 2 % of a training that saves at every step
_PANELS = (
    ("loss, nats per token", ("loss", "eval_loss", "eval_*_loss")),
    ("learning rate", ("learning_rate",)),
    ("tokens per second", ("tokens_per_second",)),
    ("peak memory, MiB", ("peak_memory_mib",)),
)
_LABELS = {"loss": "training", "eval_loss": "held out"}

Line = dict[str, Any]
logger = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl` and `training.png` into the output folder, on the first process of all.

    A line has `step` and whatever was logged, numbers that are not finite as null. What was logged before training
    comes first; without a training nothing is written. The picture is drawn at the end and, at most every half minute,
    when a checkpoint is saved. What fails, such as a full disk, is one warning; a later line then writes all of them.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._path: Path | None = None
        self._is_whole = False
        self._drawn = 0.0
        self._warned: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        before = self._lines if self._path is None else []  # of an evaluation before training, not of another training
        self._lines = [*before, *map(_line, state.log_history)]
        self._path = Path(args.output_dir) / METRICS_FILE
        self._drawn = time.monotonic()
        self._is_whole = False
        self._try("write", self._rewrite)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._lines.append(_line(state.log_history[-1]))  # whole: from `logs` other callbacks take things out
        if self._path is not None:
            self._try("write", self._append if self._is_whole else self._rewrite)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_PICTURES:
            self._picture()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._picture()

    def _append(self) -> None:
        self._is_whole = False
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._lines[-1]) + "\n")
        self._is_whole = True

    def _rewrite(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        replace_file(self._path, text.encode())
        self._is_whole = True

    def _picture(self) -> None:
        if self._path is None:
            return
        if find_spec("matplotlib") is None:
            self._say("draw", f"{PICTURE_FILE} is not drawn: matplotlib is not installed (pip install matplotlib)")
            return
        self._try("draw", lambda: draw_training(self._lines, self._path.with_name(PICTURE_FILE)))
        self._drawn = time.monotonic()

    def _try(self, what: str, action: Callable[[], None]) -> None:
        """Whatever goes wrong with a picture or a line, the training is worth more."""
        try:
            action()
        except Exception as error:
            name = METRICS_FILE if what == "write" else PICTURE_FILE
            self._say(what, f"{name} could not be written, training goes on: {type(error).__name__}: {error}")

    def _say(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message)


def draw_training(lines: Sequence[Line], path: Path) -> None:
    """Four panels over the steps: training and held-out loss, learning rate, tokens per second, peak memory.

    Args:
        lines: as in `metrics.jsonl`.
        path: the picture (png), replaced at once.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # by itself it draws with Agg and leaves pyplot's state alone

    figure = Figure(figsize=(10, 6.5))
    figure.subplots_adjust(left=0.08, right=0.98, top=0.94, bottom=0.08, hspace=0.32, wspace=0.22)
    for axis, (title, patterns) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for name in _curves(lines, patterns):
            # NaN breaks a curve, and a marker shows a point that has no neighbour.
            points = [(line["step"], _number(line[name])) for line in lines if name in line]
            marker = "o" if len(points) < 30 else None
            axis.plot(*zip(*points, strict=True), label=_LABELS.get(name, name), marker=marker, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if "loss" not in patterns:
            axis.set_ylim(bottom=0)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    replace_file(path, picture.getvalue())


def _curves(lines: Sequence[Line], patterns: Sequence[str]) -> list[str]:
    """Names of the lines' values that a panel shows, in the order of its patterns."""
    names = dict.fromkeys(name for line in lines for name in line)
    return list(dict.fromkeys(name for pattern in patterns for name in names if fnmatchcase(name, pattern)))


def _line(log: Line) -> Line:
    """One entry of the log history as JSON can hold it, its step first."""
    return {"step": log["step"], **{name: _plain(value) for name, value in log.items()}}


def _plain(value: Any) -> Any:
    """Numbers as they are, null where they are not finite, everything else as text."""
    if hasattr(value, "item"):
        value = value.item()  # of a tensor or a numpy scalar
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan
