"""The results file: one CSV row per training run, appended as it ends and found again by the run's key."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.quality.backbones import SIZES
from benchmarks.quality.methods import find_method


@dataclass(frozen=True)
class Run:
    """What is trained; the key of a row.

    Attributes:
        method: as `benchmarks.quality.methods.find_method` reads it.
        size: of the backbone.
        task: a name in `benchmarks.quality.tasks.TASKS`.
        budget: "flops=2e+12" (as many steps as cost that) or "steps=100".
        learning_rate: at the peak.
        seed: of the data's order and the initial weights.
    """

    method: str
    size: str
    task: str
    budget: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Row:
    """A run and what came of it.

    Attributes:
        steps, tokens: of the training; tokens without padding.
        flops: of it, forward and backward.
        trained_parameters: of adapters or side network.
        peak_bytes, peak_bytes_checkpointing: see `benchmarks.quality.methods.Peaks`.
        seconds: of the steps alone, by the clock; None where other runs were trained beside it.
        cpu_seconds: processor time of the same, of all threads, which a busy machine stretches less.
        curve: [step, loss on the whole held-out set] at a few points, from step 0 on.
        loss: the last of these, nats per supervised token; infinite where training diverged.
        accuracy: of greedy answers, by group of examples.
        mark: "foreign_load" where other processes took so much of the CPU that the times mean little.
        facts: machine, versions, commit and date.
    """

    run: Run
    steps: int
    tokens: int
    flops: float
    trained_parameters: int
    peak_bytes: int
    peak_bytes_checkpointing: int | None
    seconds: float | None
    cpu_seconds: float | None
    curve: list[tuple[int, float]]
    loss: float
    accuracy: dict[str, float]
    mark: str
    facts: dict[str, str]


_Number = TypeVar("_Number", int, float)
_KEYS = tuple(field.name for field in fields(Run))
_VALUES = tuple(field.name for field in fields(Row) if field.name not in ("run", "facts"))
FACTS = (
    "date", "device", "cpu", "threads", "python", "torch", "transformers", "triton", "bitsandbytes", "peft",
    "ladder_engine", "commit", "dirty",
)  # fmt: skip
COLUMNS = (*_KEYS, *_VALUES, *FACTS)


def append_row(path: Path, row: Row) -> None:
    """Append a row, behind a header where the file is new; it is on the disk when this returns."""
    cells = asdict(row.run) | {name: getattr(row, name) for name in _VALUES}
    cells |= {name: json.dumps(cells[name]) for name in ("curve", "accuracy")}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow(cells | {name: row.facts[name] for name in FACTS})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Every row; none of a file that is not there.

    Raises:
        ValueError: another header, or a row that is damaged, there twice or of an unknown method, size or budget; the
            message names the line.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    if tuple(lines[0].split(",")) != COLUMNS:
        raise ValueError(
            f"{path}: expected the header {','.join(COLUMNS)}, got {lines[0][:200]!r}; name another file with "
            "--out, or move this one away"
        )
    rows: dict[Run, Row] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            row = _row(next(csv.reader([line]), []))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; delete the line, then its run is done again") from error
        if row.run in rows:
            raise ValueError(f"{path}, line {number}: {row.run} is there already; delete one of the two lines")
        rows[row.run] = row
    return list(rows.values())


def drop_torn_line(path: Path) -> bool:
    """Cut off a last line without an end, which is what a run that was killed while it wrote leaves; True if one was.

    Its run is then done again. A file that does not begin as a results file is left alone, for `read_rows` to refuse.
    """
    if not path.is_file():
        return False
    content, header = path.read_bytes(), ",".join(COLUMNS).encode()
    whole = content[: content.rfind(b"\n") + 1]
    if whole == content or not (content.startswith(header + b"\n") or header.startswith(content)):
        return False
    with path.open("r+b") as file:
        file.truncate(len(whole))
    return True


def parsed_budget(budget: str) -> tuple[str, float]:
    """Kind and amount of a budget.

    Raises:
        ValueError: neither "flops=NUMBER" nor "steps=NUMBER", with a positive number.
    """
    kind, _, text = budget.partition("=")
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if kind not in ("flops", "steps") or not 0 < amount < math.inf:
        raise ValueError(f"budget {budget!r}: expected flops=NUMBER or steps=NUMBER, such as flops=2e12")
    return kind, amount


def _row(values: list[str]) -> Row:
    if len(values) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} values, got {len(values)}")
    cells = dict(zip(COLUMNS, values, strict=True))
    run = Run(
        cells["method"],
        cells["size"],
        cells["task"],
        cells["budget"],
        _number(cells, "learning_rate"),
        _count(cells, "seed"),
    )
    find_method(run.method)
    if run.size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {run.size!r}")
    parsed_budget(run.budget)
    curve, accuracy = _json(cells, "curve", list), _json(cells, "accuracy", dict)
    if not all(type(share) in (int, float) and 0 <= share <= 1 for share in accuracy.values()):
        raise ValueError(f"accuracy: expected shares from 0 to 1, got {cells['accuracy'][:80]!r}")
    if not all(isinstance(point, list) and len(point) == 2 for point in curve):
        raise ValueError(f"curve: expected [[step, loss], ...], got {cells['curve'][:80]!r}")
    return Row(
        run=run,
        steps=_count(cells, "steps"),
        tokens=_count(cells, "tokens"),
        flops=_number(cells, "flops"),
        trained_parameters=_count(cells, "trained_parameters"),
        peak_bytes=_count(cells, "peak_bytes"),
        peak_bytes_checkpointing=_if_any(_count, cells, "peak_bytes_checkpointing"),
        seconds=_if_any(_number, cells, "seconds"),
        cpu_seconds=_if_any(_number, cells, "cpu_seconds"),
        curve=[(step, loss) for step, loss in curve],
        loss=_number(cells, "loss"),
        accuracy=accuracy,
        mark=cells["mark"],
        facts={name: cells[name] for name in FACTS},
    )


def _number(cells: dict[str, str], name: str) -> float:
    """A number that is not negative; a loss may be infinite."""
    try:
        value = float(cells[name])
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {cells[name]!r}")
    return value


def _count(cells: dict[str, str], name: str) -> int:
    if not cells[name].isdigit():
        raise ValueError(f"{name}: expected a whole number, got {cells[name]!r}")
    return int(cells[name])


def _if_any(read: Callable[[dict[str, str], str], _Number], cells: dict[str, str], name: str) -> _Number | None:
    return read(cells, name) if cells[name] else None


def _json(cells: dict[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(cells[name])
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected JSON, a {kind.__name__}, got {cells[name][:80]!r}")
    return value
