"""In deterministic mode a training step has one result: loss, gradients and trained parameters, bit for bit.

Thirty times on a GPU, where atomics and split products would show; a few times through the CPU's path elsewhere.
"""

from __future__ import annotations

import copy
import hashlib
import os

# torch asks for it before the first product in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch import Tensor

from benchmarks.models import random_backbone
from benchmarks.shapes import ModelShape
from engine import LadderConfig, LadderForCausalLM
from engine.data.collator import Collator

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]

GPU_REPEATS = 30
CPU_REPEATS = 3
SMALL = ModelShape("qwen2", 64, 128, 4, 2, 1, 32, 256, True, 512, 1e-6, 1e4)
# Wide and long enough that many thread blocks add to the same gradients.
LARGE = ModelShape("qwen2", 512, 1408, 8, 8, 2, 64, 8192, True, 4096, 1e-6, 1e4)


def _batch(shape: ModelShape, lengths: tuple[int, ...], device: torch.device) -> dict[str, Tensor | int]:
    """Packed documents, half of whose tokens are supervised."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        input_ids = torch.randint(shape.vocab_size, (length,), generator=generator)
        labels = input_ids.clone()
        labels[: length // 2] = -100
        samples.append({"input_ids": input_ids, "labels": labels})
    batch = Collator()(samples)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _step_hash(start: LadderForCausalLM, batch: dict[str, Tensor | int]) -> str:
    """sha256 of the loss, all gradients and all parameters after one step of AdamW."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    digest = hashlib.sha256(loss.detach().cpu().numpy().tobytes())
    for parameter in model.parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        for tensor in (parameter.grad, parameter.detach()):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("lengths", ["packed", "one"])
@pytest.mark.parametrize("preset", ["ladder", "xladder"])
def test_determinism_of_a_training_step(preset: str, lengths: str, gpu_device: torch.device) -> None:
    is_gpu = gpu_device.type == "cuda"
    shape, tokens = (LARGE, 1024) if is_gpu else (SMALL, 96)
    documents = (tokens,) if lengths == "one" else (tokens // 2 + 7, tokens // 2 - 7)
    config = LadderConfig.preset(preset, reduction_factor=4 if is_gpu else 2)
    model = LadderForCausalLM.from_backbone(random_backbone(shape, gpu_device), config).train()
    with torch.no_grad():
        model.side_network.side_up.normal_(std=0.02)  # zero lets no gradient through to the side layers
    batch = _batch(shape, documents, gpu_device)
    repeats = GPU_REPEATS if is_gpu else CPU_REPEATS
    assert len({_step_hash(model, batch) for _ in range(repeats)}) == 1
