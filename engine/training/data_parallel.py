"""Many processes, one side network: each has the backbone, DDP averages the gradients of the trained parameters alone.

Nothing of the backbone is sent: a step all-reduces the side network's gradients, 4 bytes x trainable parameters, once,
however many micro-batches it has. At the shape of Qwen2.5-7B with reduction_factor 16 that is 0.2 GB. A step is what
one process would make of the same global batch; only where an epoch ends within a batch, accelerate fills that one up
from the epoch's start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from engine.model.rows import IGNORE_INDEX


def all_reduced_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that every process hands to one all-reduce per optimizer step."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


class WholeRounds(Dataset):
    """A data set whose length is a multiple, filled up with samples without a loss.

    Processes must have equally many batches, for which accelerate repeats samples from the beginning: in an evaluation
    these would count twice.

    Args:
        data: samples with `input_ids` and perhaps `labels`, or lists of such that were packed.
        multiple: samples that all processes take together.
    """

    def __init__(self, data: Dataset[Mapping[str, Any]], multiple: int) -> None:
        self._data = data
        self._length = -(-len(data) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if index < len(self._data):
            return self._data[index]
        sample = self._data[0]
        return [_without_loss(document) for document in sample] if isinstance(sample, list) else _without_loss(sample)


def _without_loss(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    ids = sample["input_ids"]
    labels = torch.full((len(ids),), IGNORE_INDEX)
    return {**sample, "labels": labels if isinstance(ids, torch.Tensor) else labels.tolist()}
