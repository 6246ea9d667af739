"""SIGTERM and SIGINT: finish the optimizer step, write a checkpoint, and leave with the exit status of the signal.

A scheduler sees 143 (130 for Ctrl-C) and knows that the work is not done. An evaluation is cut short, and made up for
when training is resumed: the best model and early stopping depend on it. A second SIGINT leaves at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EvaluationInterrupted(Exception):
    """Raised out of an evaluation by a signal."""


class Interruption(TrainerCallback):
    """A context in which signals are noted, and the callback that acts on them where training may stop.

    Args:
        trainer: whose processes have to agree, and whose checkpoints are written.

    Attributes:
        evaluation_due: the evaluation of the last step was cut off, or left out.
        leader: in a sweep, whose signals this training acts on, once all of its trainings stand still (`agree`), so
            that they stop at the same step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None  # between all processes, which may have received none
        self._handlers: dict[signal.Signals, Any] = {}
        self.evaluation_due = False
        self.leader: Interruption | None = None

    @property
    def exit_status(self) -> int | None:
        """128 + the signal, once there was one in this context, and all who train together know of it."""
        number = self._acted_on if self._trainer.args.world_size == 1 else self._agreed
        return None if number is None else 128 + number

    def agree(self) -> None:
        """Let those who follow act on what was received."""
        self._agreed = self._received

    @property
    def _acted_on(self) -> signal.Signals | None:
        return self._received if self.leader is None else self.leader._agreed

    def __enter__(self) -> Interruption:
        self._received = self._agreed = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._handlers = {
                number: signal.signal(number, self._note)
                for number in SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN  # of a background job of a script, say
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        late = self._received if self.exit_status is None and kind is None else None
        self._handlers = {}
        self._received = self._agreed = None
        if late is not None:  # the others have ended training without hearing of it
            os.kill(os.getpid(), late)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise SystemExit(128 + number)
        self._received = signal.Signals(number)
        again = "; press Ctrl-C again to leave at once" if number == signal.SIGINT else ""
        text = f"{self._received.name} received: training stops after this step with a checkpoint{again}\n"
        os.write(2, text.encode())  # a print here might be within another one

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate the resumed step, where that is due."""
        if self.evaluation_due:
            self.evaluation_due = False
            metrics = self._trainer._evaluate(None, None)
            self._trainer._determine_best_metric(metrics=metrics, trial=None)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop with a checkpoint where any process has received a signal."""
        if self.any_received():
            control.should_save = True
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False
            control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Leave an evaluation, unless other processes would wait for this one's part of it."""
        if self._acted_on is not None and self._trainer.is_in_train and args.world_size == 1:
            self.evaluation_due = state.global_step > 0
            raise EvaluationInterrupted
        return control

    def any_received(self) -> bool:
        """Whether a signal was received by any process; all ask together.

        One that arrives while they agree is heard of the next time.
        """
        trainer = self._trainer
        if trainer.args.world_size == 1:
            return self._acted_on is not None
        mine = torch.tensor(int(self._received or 0), device=trainer.args.device)
        number = int(trainer.accelerator.gather(mine.reshape(1)).max())
        if number:
            self._agreed = signal.Signals(number)
        return self._agreed is not None
