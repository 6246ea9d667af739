"""The largest step of a run, tried before the first one: memory that will not suffice runs out now, not in an hour.

Where samples are of many lengths, the largest micro-batches come late or never, and the memory plan is an estimate.
With `LadderArguments(longest_first=True)` the longest samples pass forward and backward once, beside memory for what
the optimizer will hold, and nothing of it stays: gradients are dropped, random states and the clock are put back, no
sample counts as seen. Training, new or resumed, then gives the same bits as without. With `auto_find_batch_size` it is
where the batch size is found.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from engine.training.arguments import optimizer_policy
from engine.training.summary import StepClock

logger = logging.getLogger(__name__)


class LongestBatchFirst(TrainerCallback):
    """Tries the micro-batches of the largest step that the training data can give, when training begins.

    Args:
        trainer: its `train_dataset` has `lengths`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer with everything in place but the first batch."""
        trainer, data = self._trainer, self._trainer.train_dataset
        size, passes = trainer._train_batch_size, trainer.args.gradient_accumulation_steps
        longest = np.argsort(-data.lengths, kind="stable")[: size * passes].tolist()
        samples = [data[index] for index in longest]
        try_batches(trainer, [trainer.data_collator(samples[i : i + size]) for i in range(0, len(samples), size)])


def try_batches(trainer: Trainer, batches: Sequence[Mapping[str, Any]]) -> None:
    """Forward and backward of the micro-batches of a step, of which nothing stays.

    Args:
        trainer: inside of `train()`, model and optimizer prepared, no gradients yet.
        batches: as of its data loader.
    """
    device = trainer.args.device
    clock, trainer.clock = trainer.clock, StepClock(device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            moments = _missing_moments(trainer)
            batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), device)
            for batch in batches:
                trainer.training_step(trainer.model_wrapped, batch, num_items)
            del moments
    finally:
        trainer.clock = clock
    trainer.model.zero_grad()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    logger.info("the longest batches fit: %d tokens, peak %.0f MiB", tokens, trainer.peak_memory.mib())


def _missing_moments(trainer: Trainer) -> list[Tensor]:
    """Memory for the two moments of each parameter, which AdamW makes in its first step."""
    if "adamw" not in trainer.args.optim:
        return []
    dtype = torch.uint8 if optimizer_policy(trainer.args) == "adamw_8bit" else torch.float32
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    made = trainer.optimizer.state
    return [p.new_empty((2, *p.shape), dtype=dtype) for p in parameters if p not in made]
