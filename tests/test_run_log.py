"""metrics.jsonl and training.png: every log call once, also after a crash and resume; training never stops for them."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import ladder_model
from transformers import TrainerCallback, TrainerControl, TrainerState

from engine import LadderArguments, LadderTrainer
from engine.training import run_log
from engine.training.run_log import METRICS_FILE, PICTURE_FILE, RunLog, draw_training

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j)} for i in range(4) for j in range(4)]
PNG = b"\x89PNG\r\n\x1a\n"


def arguments(folder: Path, **overrides: Any) -> LadderArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return LadderArguments(output_dir=str(folder), **(settings | overrides))


def read(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / METRICS_FILE).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


class Run:
    """A log's callbacks, called as the Trainer calls them."""

    def __init__(self, folder: Path, **state: Any) -> None:
        self.log = RunLog()
        self.args = arguments(folder)
        self.state = TrainerState(is_world_process_zero=True, **state)

    def __call__(self, event: str, **kwargs: Any) -> None:
        getattr(self.log, f"on_{event}")(self.args, self.state, TrainerControl(), **kwargs)

    def step(self, **logs: Any) -> None:
        self.state.global_step += 1
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self("log", logs={})


def test_a_training_leaves_its_lines_and_a_picture(tmp_path: Path) -> None:
    trainer = LadderTrainer(
        ladder_model(),
        arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=PAIRS,
        eval_dataset={"easy": PAIRS[:2], "hard": PAIRS[2:4]},
    )
    trainer.evaluate()
    trainer.train()
    trainer.log({"note": "the end", "value": torch.tensor(2.0)})
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 4, 4]
    trained = [line for line in lines if "loss" in line]
    expected = {"epoch", "grad_norm", "learning_rate", "loss", "peak_memory_mib", "step", "tokens_per_second"}
    assert all(expected <= line.keys() for line in trained)
    assert lines[2:-1] == trainer.state.log_history[:-1]
    assert lines[-1]["note"] == "the end" and lines[-1]["value"] == 2.0
    assert (tmp_path / PICTURE_FILE).read_bytes().startswith(PNG)
    assert not list(tmp_path.glob(".*"))


def test_without_a_training_nothing_is_written(tmp_path: Path) -> None:
    LadderTrainer(ladder_model(), arguments(tmp_path), eval_dataset=PAIRS[:2]).evaluate()
    assert not list(tmp_path.iterdir())


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.state.is_world_process_zero = False
    run("train_begin")
    run.step(loss=1.0)
    run("save")
    run("train_end")
    assert not list(tmp_path.iterdir())


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Stopped at step 3, resumed from the checkpoint of step 2, with a line that a crash has cut in half."""
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=2)
    LadderTrainer(ladder_model(), args, train_dataset=PAIRS, callbacks=[StopAt()]).train()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 3]
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    resumed = LadderTrainer(ladder_model(), args, train_dataset=PAIRS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line["step"] for line in read(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]
    assert "train_runtime" in read(tmp_path)[-1]


def test_another_training_starts_another_file(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 99}\n')
    run = Run(tmp_path)
    for _ in range(2):
        run.state.global_step, run.state.log_history = 0, []
        run("train_begin")
        run.step(loss=1.0)
        assert read(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run("train_begin")
    run.step(loss=float("nan"), grad_norm=float("inf"), scale=torch.tensor(0.5), where=Path("a"), count=3, none=None)
    line = {"step": 1, "loss": None, "grad_norm": None, "scale": 0.5, "where": "a", "count": 3, "none": None}
    assert read(tmp_path) == [line]


def test_a_full_disk_is_one_warning_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run("train_begin")
    run.step(loss=4.0)

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        with open(path, "ab") as file:
            file.write(b'{"step": 2, "l')  # what fitted
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "open", full)
        patched.setattr(Path, "write_bytes", full)
        run.step(loss=3.0)
        run.step(loss=2.0)
    assert [record.message for record in caplog.records] == [
        "metrics.jsonl could not be written, training goes on: OSError: [Errno 28] No space left on device"
    ]
    run.step(loss=1.0)
    assert [line["loss"] for line in read(tmp_path)] == [4.0, 3.0, 2.0, 1.0]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_pictures_at_saves_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [100.0], []
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_log, "draw_training", lambda lines, path: drawn.append(now[0]))
    run = Run(tmp_path)
    run("train_begin")
    for now[0] in (101.0, 129.0, 131.0, 140.0, 162.0):
        run("save")
    now[0] = 163.0
    run("train_end")
    assert drawn == [131.0, 162.0, 163.0]


def test_drawing_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(run_log, "draw_training", fail)
    run = Run(tmp_path)
    for _ in range(2):
        run("train_begin")
        run("train_end")
    expected = "training.png could not be written, training goes on: RuntimeError: no font"
    assert [record.message for record in caplog.records] == [expected]


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_log, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = Run(tmp_path)
    run("train_begin")
    run.step(loss=1.0)
    run("train_end")
    run("train_end")
    assert [record.message for record in caplog.records] == [
        "training.png is not drawn: matplotlib is not installed (pip install matplotlib)"
    ]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": None, "learning_rate": "high"}],
        [{"step": n, "loss": 1 / n, "eval_a_loss": 2 / n, "eval_b_loss": 3 / n, "eval_loss": 4 / n} for n in (1, 2)],
    ],
)
def test_any_lines_can_be_drawn(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    draw_training(lines, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert len(list(tmp_path.iterdir())) == 1
