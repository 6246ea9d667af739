"""SIGTERM and SIGINT in every phase: a checkpoint, the exit status, and training that goes on to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import ladder_model
from transformers import TrainerCallback

from engine import LadderArguments, LadderTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"input_ids": list(range(start, start + 20)), "labels": list(range(start, start + 20))} for start in range(24)]


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    """What a process has that was started in a terminal: in the background SIGINT may be ignored from the start."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Phases(LadderTrainer):
    """Sends a signal to this process in a phase of a step."""

    kill: Callable[[str], None] = staticmethod(lambda phase: None)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.kill("data")
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.kill("forward")
        loss = super().compute_loss(*args, **kwargs)
        loss.register_hook(lambda gradient: self.kill("backward"))
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.kill("evaluation")
        return super().prediction_step(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.kill("save")
        super().save_model(*args, **kwargs)


def trainer(folder: Path, callbacks: list[TrainerCallback] | None = None) -> Phases:
    arguments = LadderArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
        save_strategy="steps",
        save_steps=4,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = ladder_model("xladder", reduction_factor=1).train()
    return Phases(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:6], callbacks=callbacks)


def weights(made: Phases) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    made = trainer(tmp_path_factory.mktemp("whole"))
    made.train()
    return weights(made)


def sends(made: Phases, phase: str, times: list[int], number: signal.Signals) -> None:
    """At the given calls of that phase."""
    calls = 0

    def kill(name: str) -> None:
        nonlocal calls
        calls += name == phase
        if name == phase and calls in times:
            os.kill(os.getpid(), number)

    made.kill = kill  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("phase", "call", "saved"),
    [("data", 3, 3), ("forward", 5, 3), ("backward", 4, 2), ("evaluation", 2, 2), ("save", 1, 4)],
)
def test_a_signal_saves_and_leaves(
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    capfd: pytest.CaptureFixture[str],
    phase: str,
    call: int,
    saved: int,
    number: signal.Signals,
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    made = trainer(tmp_path)
    sends(made, phase, [call], number)
    with pytest.raises(SystemExit) as left:
        made.train()
    assert left.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert f"{number.name} received: training stops after this step" in capfd.readouterr().err
    assert max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")) == saved + (phase == "save")
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert [line["step"] for line in again.state.log_history if "eval_loss" in line] == [2, 4, 6, 8]
    for name, weight in weights(again).items():
        assert torch.equal(weight, uninterrupted[name]), name


def test_a_step_that_is_saved_is_not_saved_again(tmp_path: Path, uninterrupted: dict[str, torch.Tensor]) -> None:
    """Interrupted twice in one evaluation: the checkpoint stays as it is, and still says that it is due."""
    before = None
    for _ in range(2):
        made = trainer(tmp_path)
        sends(made, "evaluation", [2], signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            made.train(resume_from_checkpoint=before is not None)
        (checkpoint,) = tmp_path.glob("checkpoint-*")
        files = {path: (path.stat().st_ino, path.read_bytes()) for path in checkpoint.iterdir()}
        assert (left.value.code, made.state.global_step) == (143, 2)
        assert before in (None, files)
        before = files
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert [line["step"] for line in again.state.log_history if "eval_loss" in line] == [2, 4, 6, 8]
    assert all(torch.equal(weight, uninterrupted[name]) for name, weight in weights(again).items())


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    sends(made, "forward", [3, 4], signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        made.train()
    assert left.value.code == 130 and made.state.global_step == 1
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As in a background job of a script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    made = trainer(tmp_path)
    sends(made, "forward", [3], signal.SIGINT)
    assert made.train().global_step == 8


def test_other_threads_may_train(tmp_path: Path) -> None:
    """Python lets no other thread handle signals: there they stay as they are."""
    import threading

    made, done = trainer(tmp_path), []
    thread = threading.Thread(target=lambda: done.append(made.train().global_step))
    thread.start()
    thread.join()
    assert done == [8]
