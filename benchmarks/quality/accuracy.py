"""Greedy answers, right or wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.quality.tasks.samples import Example

BATCH = 64


def accuracies(model: nn.Module, examples: Sequence[Example], device: torch.device) -> dict[str, float]:
    """Share of right answers by group; an answer is right if the greedy continuation begins with all of it."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(examples, key=lambda example: (len(example.answer), len(example.prompt)))
    for begin in range(0, len(ordered), BATCH):
        batch = ordered[begin : begin + BATCH]
        for example, ids in zip(batch, _continued(model, batch, device), strict=True):
            right[example.group].append(ids[: len(example.answer)] == example.answer)
    return {group: round(sum(found) / len(found), 4) for group, found in sorted(right.items())}


def _continued(model: nn.Module, batch: Sequence[Example], device: torch.device) -> list[list[int]]:
    """As many new tokens for each prompt as the longest answer has; prompts are padded on the left, with a cache."""
    width = max(len(example.prompt) for example in batch)
    prompts = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    for row, example in enumerate(batch):
        prompts[row, width - len(example.prompt) :] = torch.tensor(example.prompt)
        mask[row, width - len(example.prompt) :] = 1
    with torch.no_grad():
        # No end of text: an answer is read up to its own length, whatever follows.
        generated = model.generate(
            input_ids=prompts.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(len(example.answer) for example in batch),
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    return generated[:, width:].tolist()
