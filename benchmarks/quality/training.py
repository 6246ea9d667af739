"""The trainings behind rows: one by a stock Trainer, or several side networks on the passes of one backbone.

Both kinds get the same data in the same order, batches of documents side by side, AdamW without decay, clipping at 1,
and a linear decay to zero behind a short warm-up, each run to its own end.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from benchmarks.quality.methods import Method
from benchmarks.quality.tasks.samples import Sample, TaskData
from engine.data.collator import Collator
from engine.training.arguments import LadderArguments
from engine.training.guards import DivergedError

BATCH = 16
WARMUP_SHARE = 0.05
CURVE_POINTS = 4
"""Held-out losses after the start, the last one at the end."""


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A task's samples as trainers take them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self._samples):
            raise IndexError(index)
        sample = self._samples[index]
        return {"input_ids": torch.tensor(sample.input_ids), "labels": torch.tensor(sample.labels)}


@dataclass(frozen=True)
class Trained:
    """A training and what was seen of it.

    Attributes:
        model: with its last weights.
        converged: False where it diverged.
        curve: (step, held-out loss).
        tokens: it was given.
        seconds, cpu_seconds: of its steps; None where others trained beside it.
    """

    model: nn.Module
    converged: bool
    curve: list[tuple[int, float]]
    tokens: int
    seconds: float | None
    cpu_seconds: float | None


def train(
    method: Method, model: nn.Module, data: TaskData, learning_rates: Sequence[float], steps: int, seed: int
) -> list[Trained]:
    """Train the model once for each learning rate, from the same weights; several only with `LadderTrainer`."""
    start = heldout_loss(model, data.heldout)
    with tempfile.TemporaryDirectory(prefix="ladder-quality-") as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = _arguments(folder, method, model, learning_rates[0], steps, seed)
        members = [{"name": str(number), "learning_rate": rate} for number, rate in enumerate(learning_rates)]
        options = {"sweep": members} if len(members) > 1 else {}
        trainer = method.trainer(
            model, arguments, data_collator=Collator(), train_dataset=Samples(data.train), **options
        )
        trainers = trainer.sweep.members if options else [trainer]
        watches = [_Watch(one.model, data.heldout, steps, start) for one in trainers]
        for one, watch in zip(trainers, watches, strict=True):
            one.add_callback(watch)
        try:
            trainer.train()
            diverged = [result.error is not None for result in trainer.sweep.results] if options else [False]
        except DivergedError:
            diverged = [True] * len(trainers)
    return [watch.trained(not failed, alone=not options) for watch, failed in zip(watches, diverged, strict=True)]


def heldout_loss(model: nn.Module, heldout: Sequence[Sample]) -> float:
    """Mean cross entropy in nats over every supervised token."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(heldout), BATCH):
            batch = _on_device(Collator()(Samples(heldout[begin : begin + BATCH])), device)
            total += float(model(**batch, num_items_in_batch=1)["loss"])
            count += int((batch["labels"] != -100).sum())
    model.train(was_training)
    return total / count


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors there."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _arguments(
    folder: str, method: Method, model: nn.Module, learning_rate: float, steps: int, seed: int
) -> LadderArguments:
    on_cpu = next(model.parameters()).device.type == "cpu"
    return LadderArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_SHARE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=not on_cpu and method.trainer is Trainer,  # adapters under autocast, as QLoRA's users train them
        dataloader_pin_memory=not on_cpu,
        dataloader_drop_last=True,  # every step is of as many samples
    )


class _Watch(TrainerCallback):
    """Held-out losses at a few steps, and the time and tokens of the steps between them."""

    def __init__(self, model: nn.Module, heldout: Sequence[Sample], steps: int, start: float) -> None:
        self._model = model
        self._heldout = heldout
        self._points = {round(steps * part / CURVE_POINTS) for part in range(1, CURVE_POINTS + 1)} - {0}
        self._began = (0.0, 0.0)
        self._curve = [(0, start)]
        self._seconds = self._cpu_seconds = 0.0
        self._tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def trained(self, ended: bool, alone: bool) -> Trained:
        """What was seen; the clock says nothing of one that others trained beside."""
        return Trained(
            model=self._model,
            converged=ended and math.isfinite(self._curve[-1][1]),
            curve=self._curve,
            tokens=self._tokens,
            seconds=self._seconds if alone else None,
            cpu_seconds=self._cpu_seconds if alone else None,
        )

    def _count(self, model: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        if model.training:
            self._tokens += inputs["input_ids"].numel()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = self._now()
        self._seconds += now[0] - self._began[0]
        self._cpu_seconds += now[1] - self._began[1]
        if state.global_step in self._points:
            self._curve.append((state.global_step, heldout_loss(self._model, self._heldout)))

    def _now(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()
