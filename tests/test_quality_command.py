"""Wrong arguments to the benchmark of learning quality, and files that are not its own: one line, nothing lost."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command_line
from benchmarks.quality import command, figures
from benchmarks.quality.rows import COLUMNS, FACTS, Row, Run, append_row, read_rows
from benchmarks.quality.summary import cells, scalings, table


def row(run: Run, loss: float, **changes: Any) -> Row:
    facts = dict.fromkeys(FACTS, "x")
    values = {"flops": 1e9, "accuracy": {}} | changes
    return Row(
        run=run, steps=1, tokens=9, trained_parameters=1, peak_bytes=1, peak_bytes_checkpointing=None, seconds=None,
        cpu_seconds=None, curve=[(0, 5.0)], loss=loss, mark="", facts=facts, **values,
    )  # fmt: skip


def run(method: str = "ladder", budget: str = "flops=1e+09", rate: float = 1e-3, seed: int = 0) -> Run:
    return Run(method, "3.0M", "hops", budget, rate, seed)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command, which has to refuse before it trains; returns what it says."""

    def train(*_: Any) -> Any:
        raise AssertionError("trained before it refused")

    def refuse(*arguments: str | Path) -> str:
        monkeypatch.setattr(command, "run_together", train)
        here = ["--out", str(tmp_path / "rows.csv"), "--cache", str(tmp_path / "cache")]
        assert command_line.main(["quality", *here, *map(str, arguments)]) == command.EXIT_USAGE
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    return refuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "7B"], "--sizes 7B"),
        (["--tasks", "chess"], "--tasks chess"),
        (["--seeds", "0"], "--seeds 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--minutes", "-1"], "--minutes -1"),
        (["--methods", "ladder:merge=max"], "merge must be one of"),
        (["--methods", "ladder", "xladder:num_taps=9"], "from 1 to the 8 blocks"),
        (["--methods", "rejoin:rejoin=1"], "rejoin=1 leaves none"),
        (["--methods", "ladder:seed=3"], "use --seeds"),
        (["--methods", "xladder:num_taps=2\n"], "no white space"),
        (["--methods", "qlora_r16:learning_rates=x"], "no setting 'learning_rates'"),
        (["--methods", "qlora_r16:trainer=1"], "no setting 'trainer'"),
        (["--methods", "qlora_r16:checkpointing=1"], "checkpointing must be True or False"),
    ],
    ids=lambda value: value[-1].strip() if isinstance(value, list) else "",
)
def test_a_wrong_argument(arguments: list[str], message: str, refused: Any) -> None:
    assert message in refused(*arguments)


@pytest.mark.parametrize("option", ["--out", "--json", "--cache"])
def test_a_place_that_cannot_be_written(option: str, tmp_path: Path, refused: Any) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert option in refused(option, file / "below")
    assert option in refused(option, file if option == "--cache" else tmp_path)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("text", ['{"precious": 1}', "first line\nlast line", ",".join(COLUMNS) + "x\nmine"])
def test_another_file_is_left_as_it_is(text: str, tmp_path: Path, refused: Any) -> None:
    path = tmp_path / "important"
    path.write_text(text)
    assert "expected the header" in refused("--out", path, "--minutes", "0")
    assert path.read_text() == text


def test_without_peft_or_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("benchmarks.quality")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("benchmarks.quality")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line.main(["quality", "--small"]) == command_line.EXIT_USAGE
    assert "[peers]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ((",ladder,", ",footbridge,"), "no method"),
        ((",3.0M,", ",9M,"), "size: expected one of"),
        (("flops=1e+09", "flops=x"), "expected flops=NUMBER"),
        (('""hops=1"": 0.5', '""hops=1"": ""half""'), "accuracy: expected shares"),
    ],
    ids=["method", "size", "budget", "accuracy"],
)
def test_a_row_of_what_there_is_not(damage: tuple[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_row(path, row(run(), 4.0, accuracy={"hops=1": 0.5}))
    header, line, _ = path.read_text().split("\n")
    changed = ("," + line).replace(*damage)[1:]
    assert changed != line
    path.write_text(f"{header}\n{changed}\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        read_rows(path)


def test_figures_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main([str(tmp_path / "no" / "rows.csv")]) == command.EXIT_USAGE
    assert "there is none" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_seed_that_diverged_is_counted_and_not_averaged() -> None:
    rows = [row(run(rate=1e-2, seed=seed), loss) for seed, loss in enumerate((3.0, math.inf, 3.2))]
    (cell,) = cells([*rows, row(run(rate=1e-3), 3.3)])
    assert (cell.learning_rate, cell.seeds, cell.diverged, cell.loss) == (1e-2, 2, 1, pytest.approx(3.1))
    assert "2 seeds, 1 more diverged" in table(rows)
    assert cells([row(run(), math.inf)]) == []


def test_rows_with_other_groups_and_budgets_of_the_same_cost() -> None:
    """Neither is an error: groups are those of any seed, and a fit needs three different costs."""
    rows = [row(run(seed=seed), 4.0, accuracy=shares) for seed, shares in enumerate(({"a": 1.0}, {"a": 0.5, "b": 0.2}))]
    (cell,) = cells(rows)
    assert cell.accuracy == {"a": 0.75, "b": 0.2}
    same = [row(run(budget=f"flops={flops}", seed=seed), 4.0) for flops in ("1", "2", "3") for seed in range(2)]
    assert scalings(same) == []
