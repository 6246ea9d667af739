"""A training step never asks the device for a value: nothing waits, and a CUDA graph can hold it.

Under fake tensors every read of a value (item, nonzero, a boolean mask) raises, so a step that runs under them reads
none, wherever its tensors are. Document lengths are the one thing that the host must know; the collator hands them over
as integers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ladders import ladder_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from engine.data.collator import Collator
from engine.model.causal_lm import LadderForCausalLM


def _batch() -> dict[str, Any]:
    samples = []
    for length in (20, 13):
        input_ids = torch.arange(length) % 256
        labels = torch.where(input_ids < length // 2, -100, input_ids)
        samples.append({"input_ids": input_ids, "labels": labels})
    return Collator()(samples)


def _loss(model: LadderForCausalLM, batch: dict[str, Any], fake: FakeTensorMode) -> Tensor:
    on_device = {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return model(**on_device, num_items_in_batch=fake.from_tensor(torch.tensor(7))).loss


@pytest.mark.parametrize("preset", ["ladder", "xladder", "lst", "qst", "rejoin"])
def test_forward_and_backward_read_nothing(preset: str) -> None:
    model, batch = ladder_model(preset).train(), _batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        loss = _loss(model, batch, fake)
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        (("supervised_rows", "supervised_targets"), DynamicOutputShapeException),
        (("document_lengths",), DataDependentOutputException),
    ],
)
def test_a_read_would_be_seen(missing: tuple[str, ...], error: type[Exception]) -> None:
    """Without the collator's rows or lengths the model has to look for them itself."""
    model, batch = ladder_model("ladder").train(), _batch()
    for name in missing:
        del batch[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises(error):
        _loss(model, batch, fake)
