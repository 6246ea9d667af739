"""SIGTERM and SIGINT: finish the optimizer step, write a checkpoint, and leave with the exit status of the signal.

A scheduler sees 143 (130 for Ctrl-C) and knows that the work is not done. An evaluation is cut short, since it changes
nothing. A second SIGINT leaves at once.
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
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int | None:
        """128 + the signal, once there was one in this context."""
        return None if self._received is None else 128 + self._received

    def __enter__(self) -> Interruption:
        self._received = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._received = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise SystemExit(128 + number)
        self._received = signal.Signals(number)
        again = "; press Ctrl-C again to leave at once" if number == signal.SIGINT else ""
        text = f"{self._received.name} received: training stops after this step with a checkpoint{again}\n"
        os.write(2, text.encode())  # a print here might be within another one

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop with a checkpoint where any process has received a signal."""
        if self._agreed():
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Leave an evaluation, unless other processes would wait for this one's part of it."""
        if self._received is not None and args.world_size == 1:
            raise EvaluationInterrupted
        return control

    def _agreed(self) -> bool:
        trainer = self._trainer
        if trainer.args.world_size > 1:
            mine = torch.tensor(int(self._received or 0), device=trainer.args.device)
            number = int(trainer.accelerator.gather(mine.reshape(1)).max())
            self._received = signal.Signals(number) if number else None
        return self._received is not None
