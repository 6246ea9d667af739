"""A replayed training pass gives the bits of an ordinary one: CUDA graphs on a GPU, a tape of operations elsewhere."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# torch asks for it before the first product in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from graph_tape import Dispatched, TapeGraphs
from torch import Tensor

from benchmarks.models import random_backbone
from benchmarks.shapes import ModelShape
from engine import LadderArguments, LadderConfig, LadderForCausalLM, LadderTrainer
from engine.data.collator import Collator
from engine.training.step_graph import EAGER_PASSES, CudaGraphs, StepGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("deterministic")]

SMALL = ModelShape("qwen2", 64, 128, 2, 2, 1, 32, 256, True, 512, 1e-6, 1e4)
# Large enough for decoded panels on a second stream, flash attention and several chunks of the loss.
LARGE = ModelShape("qwen2", 512, 4096, 4, 8, 2, 64, 32768, True, 4096, 1e-6, 1e4)


def _model(device: torch.device, preset: str) -> LadderForCausalLM:
    """The same weights at every call."""
    is_gpu = device.type == "cuda"
    backbone = random_backbone(LARGE if is_gpu else SMALL, device)
    model = LadderForCausalLM.from_backbone(backbone, LadderConfig.preset(preset, reduction_factor=4 if is_gpu else 2))
    generator = torch.Generator().manual_seed(1)
    side_up = model.side_network.side_up
    with torch.no_grad():  # zero lets no gradient through to the side layers
        side_up.copy_(0.02 * torch.randn(side_up.shape, generator=generator))
    return model.train()


def _sample(length: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))}


def _batch(lengths: tuple[int, ...], seed: int, device: torch.device) -> dict[str, Any]:
    batch = Collator()([_sample(length, seed + place) for place, length in enumerate(lengths)])
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _alike(device: torch.device) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if device.type == "cuda" else Dispatched()


@pytest.mark.parametrize("preset", ["ladder", "xladder"])
def test_replayed_passes_equal_ordinary_ones(preset: str, gpu_device: torch.device) -> None:
    """Two layouts in turn, one of them ragged, a step between them, and evaluations that need more scratch memory."""
    is_gpu = gpu_device.type == "cuda"
    scale = 64 if is_gpu else 1
    model = _model(gpu_device, preset)
    graphs = StepGraphs(model, CudaGraphs(gpu_device) if is_gpu else TapeGraphs())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def training_pass(batch: Any) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss

    for seed in range(EAGER_PASSES + 2):
        batches = [_batch(tuple(scale * n for n in lengths), seed, gpu_device) for lengths in ((8, 8), (13, 4, 7))]
        with _alike(gpu_device):
            losses = [model(**batch).loss for batch in batches]
            expected = torch.autograd.grad(losses[0] + losses[1], list(model.parameters()))
        # Floats: a loss with its autograd nodes would tie the next capture to the stream they were made on.
        losses = [loss.item() for loss in losses]
        optimizer.zero_grad()
        found = [graphs(training_pass, batch) for batch in batches]
        assert [loss.item() for loss in found] == losses, f"loss of pass {seed}"
        for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7, msg=f"{name}, pass {seed}")
        optimizer.step()
        with torch.no_grad():
            model(**_batch((scale * (32 + seed),), seed, gpu_device))
    assert len(graphs._captured) == 2


def test_trainer_with_graphs_equals_the_trainer_without(gpu_device: torch.device, tmp_path: Path) -> None:
    is_gpu = gpu_device.type == "cuda"
    length = 512 if is_gpu else 12
    data = _Samples([_sample(length - seed % 3, seed) for seed in range(10)])
    results = []
    for graphed in (False, True):
        args = LadderArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=not is_gpu,
            disable_tqdm=True,
            cuda_graph=graphed and is_gpu,
            dataloader_num_workers=2 if is_gpu else 0,  # their thread pins memory while a graph is captured
        )
        collator = Collator(pad_to=length, row_bucket=2 * length)
        trainer = LadderTrainer(_model(gpu_device, "ladder"), args, collator, data)
        trainer.group_tokens = 1  # graphs are of single micro-batches; a group's products round differently
        if graphed and not is_gpu:
            trainer.step_graphs = StepGraphs(trainer.model, TapeGraphs())
        with _alike(gpu_device):
            trainer.train()
        results.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        results.append({name: weight.cpu() for name, weight in trainer.model.state_dict().items()})
    assert trainer.step_graphs is not None and trainer.step_graphs._captured
    assert results[0] == results[2]
    assert all(torch.equal(weight, results[3][name]) for name, weight in results[1].items())


class _Samples(torch.utils.data.Dataset):
    def __init__(self, samples: list[dict[str, Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]
