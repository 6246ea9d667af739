"""Sweeps that are stopped, killed or go wrong: all members at one step, resumed to the bit, and no error hidden."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sweeps import NAMES, ROWS, SWEEP, Raises, StopAt, assert_same_bits, trainer
from transformers import TrainerCallback

from engine.checkpoints import store
from engine.checkpoints.store import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_all_at_one_step_and_they_resume_to_the_bit(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5, "eval_steps": 3}
    stops = StopAt(1, 3e-3 if number == signal.SIGTERM else 3e-2)
    sends = StopAt(2, stops.learning_rate, number)  # who has stopped does not send
    sends.learning_rate = 3e-2 if number == signal.SIGTERM else 3e-3
    sweep = [SWEEP[0], SWEEP[1], SWEEP[2] | {"learning_rate": 1e-3}]
    try:
        made = trainer(tmp_path / "sweep", sweep, callbacks=[stops, sends], **options)
        with pytest.raises(SystemExit) as left:
            made.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 128 + number
    ended = [member.state.global_step for member in made.sweep.members]
    saved = ended[2]
    assert saved in (2, 3) and sorted(ended) == [1, saved, saved]
    again = trainer(tmp_path / "sweep", sweep, callbacks=[stops], **options)
    outputs = again.train(resume_from_checkpoint=True)
    assert len(outputs) == 2, "who had ended stays ended"
    whole = trainer(tmp_path / "whole", sweep, callbacks=[stops], **options)
    whole.train()
    for member, expected, steps in zip(again.sweep.members, whole.sweep.members, ended, strict=True):
        if steps > 1:
            assert_same_bits(member, expected, resumed=True)
        for name, weight in member.model.state_dict().items():
            assert torch.equal(weight, expected.model.state_dict()[name]), name
    for ours, theirs in zip(again.sweep.results, whole.sweep.results, strict=True):
        assert (ours.steps, ours.loss, ours.eval_loss) == (theirs.steps, theirs.loss, theirs.eval_loss)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    class Twice(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and args.learning_rate == 3e-2:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.1)  # two that come at once are one to Python

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        made = trainer(tmp_path, callbacks=[Twice()], save_strategy="steps", save_steps=9)
        with pytest.raises(SystemExit) as left:
            made.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 130 and not list(tmp_path.glob("*/checkpoint-*"))
    assert not list(tmp_path.glob("sweep.json"))
    made.evaluate()  # nothing waits for the others any more


def test_members_resume_from_the_newest_whole_step_of_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "save_total_limit": 4}
    made = trainer(tmp_path, SWEEP[:2], **options)
    made.train()
    folders = [tmp_path / name for name in NAMES[:2]]
    for folder in folders:
        (folder / "member.json").unlink()  # as if both had been killed
    (folders[0] / "checkpoint-4" / "ladder.safetensors").unlink()
    weights = folders[1] / "checkpoint-3" / "ladder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = trainer(tmp_path, SWEEP[:2], **options)
    again.train(resume_from_checkpoint=True)
    assert "step 3 is not resumed" in caplog.text and "it was cut off" in caplog.text
    for member, expected in zip(again.sweep.members, made.sweep.members, strict=True):
        assert_same_bits(member, expected, resumed=True)
    (folders[0] / "member.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"member\.json: cannot be read .*delete it to resume"):
        trainer(tmp_path, SWEEP[:2], **options).train(resume_from_checkpoint=True)
    for folder in folders:
        (folder / "member.json").unlink()
    for step, checkpoint in store.checkpoints(folders[0]):
        os.rename(checkpoint, folders[0] / f"checkpoint-{step + 10}")
    with pytest.raises(
        CheckpointError, match=r"no step in common .*base: \[11, 12, 13, 14\]; 1-learning_rate.*: \[1, 2"
    ):
        trainer(tmp_path, SWEEP[:2], **options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a sweep resumes all its members: pass True"):
        trainer(tmp_path, SWEEP[:2], **options).train(resume_from_checkpoint=str(folders[0]))


def test_resuming_takes_the_sweep_that_saved_last(tmp_path: Path) -> None:
    """Also where an older one in the same folders had come further."""
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "save_total_limit": 9}
    trainer(tmp_path, SWEEP[:2], **saves).train()
    options = saves | {"learning_rate": 1e-4}
    with pytest.raises(SystemExit):
        trainer(tmp_path, SWEEP[:2], callbacks=[StopAt(2, 1e-4, signal.SIGTERM)], **options).train()
    expected = trainer(tmp_path / "alone", SWEEP[:2], **options)
    expected.train()
    again = trainer(tmp_path, SWEEP[:2], **options)
    again.train(resume_from_checkpoint=True)
    for member, one in zip(again.sweep.members, expected.sweep.members, strict=True):
        assert_same_bits(member, one, resumed=True)
    trainer(tmp_path / "other", SWEEP[:1], **options).train()
    shutil.rmtree(tmp_path / "base")
    os.rename(tmp_path / "other" / "base", tmp_path / "base")
    for name in NAMES[:2]:
        (tmp_path / name / "member.json").unlink()
    with pytest.raises(CheckpointError, match="newest checkpoints are of different sweeps"):
        trainer(tmp_path, SWEEP[:2], **options).train(resume_from_checkpoint=True)


def test_members_that_had_ended_go_on_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    trainer(tmp_path, SWEEP[:2], **saves).train()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"max_steps": 6}, "max_steps was 4 and is 6"),
        ({"data": ROWS[:10]}, "data was"),
        ({"warmup_steps": 2}, "warmup_steps was 1 and is 2"),
    ]
    for changed, message in changes:
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path, SWEEP[:2], **(saves | changed)).train(resume_from_checkpoint=True)
    other = [SWEEP[0], {**SWEEP[1], "name": NAMES[1], "learning_rate": 9e-2}]
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.03 and is 0\.09"):
        trainer(tmp_path, other, **saves).train(resume_from_checkpoint=True)
    again = trainer(tmp_path, SWEEP[:2], **saves)
    assert again.train(resume_from_checkpoint=True) == {}
    assert [result.steps for result in again.sweep.results] == [4, 4]


def test_a_second_sweep_in_the_folder_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    class Second(TrainerCallback):
        refused: ClassVar[list[str]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def train() -> None:
                try:
                    trainer(tmp_path, SWEEP[:1]).train()
                except ValueError as error:
                    self.refused.append(str(error))

            if state.global_step == 2 and not self.refused:
                thread = threading.Thread(target=train)  # a lock is a thread's, as it is a process's
                thread.start()
                thread.join()

    trainer(tmp_path, SWEEP[:1], callbacks=[Second()]).train()
    assert "another training writes here" in Second.refused[0]
    assert (tmp_path / "base" / "member.json").exists()


def test_an_interrupt_in_a_member_stops_all(tmp_path: Path) -> None:
    made = trainer(tmp_path, SWEEP[:3], callbacks=[Raises(KeyboardInterrupt(), 2)])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert [member.state.global_step for member in made.sweep.members] == [2, 2, 1]


def test_a_signal_does_not_hide_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [Raises(KeyError("user bug"), 1), StopAt(2, 3e-3, signal.SIGTERM)]
    with pytest.raises(SystemExit):
        trainer(tmp_path, SWEEP[:2], callbacks=callbacks).train()
    assert f"member {NAMES[1]} ended with an error" in caplog.text and "user bug" in caplog.text
