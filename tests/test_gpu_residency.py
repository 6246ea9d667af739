"""Streamed layers on a card: copies and computation held up in turn, pinned memory, and what the device ever holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from ladders import batch, checkpoint_folder
from torch import Tensor

from engine.backbone import Backbone, load_backbone
from engine.backbone.layout import packed_nbytes
from engine.backbone.residency import StreamCopier
from engine.sequence import SequenceLayout

pytestmark = pytest.mark.gpu

TENTH_OF_A_SECOND = 10**8
"""In cycles, roughly."""


@pytest.fixture(scope="module")
def gpu_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def resident(gpu_device: torch.device) -> Backbone:
    return load_backbone(checkpoint_folder(), device=gpu_device)


def states(backbone: Backbone, seed: int, compute_is_late: bool = False) -> list[Tensor]:
    ids, layout = batch(11, seed=seed).to(backbone.device), SequenceLayout.packed([4, 7], backbone.device)
    found = []
    for _, hidden in backbone.hidden_states(ids, layout):
        found.append(hidden)
        if compute_is_late and hidden.is_cuda:
            torch.cuda._sleep(TENTH_OF_A_SECOND)
    return found


@pytest.mark.parametrize("late", ["copies", "computation", "neither"])
@pytest.mark.parametrize("cached", [False, True], ids=["pinned", "mapped"])
@pytest.mark.parametrize("prefetch", [1, 2])
def test_the_same_bits_however_late(
    gpu_device: torch.device, resident: Backbone, tmp_path: Path, prefetch: int, cached: bool, late: str
) -> None:
    options: dict[str, Any] = {"packed_cache": tmp_path / "cache"} if cached else {}
    backbone = load_backbone(checkpoint_folder(), device=gpu_device, residency="host", prefetch=prefetch, **options)
    copier, actual = backbone.layers._copier, []
    for seed in range(3):  # nothing waits between passes
        if late == "copies" and isinstance(copier, StreamCopier):
            with torch.cuda.stream(copier._stream):
                torch.cuda._sleep(TENTH_OF_A_SECOND)
        actual.append(states(backbone, seed, late == "computation"))
    for seed, found in enumerate(actual):
        assert all(torch.equal(*pair) for pair in zip(found, states(resident, seed), strict=True))
    if gpu_device.type == "cuda":
        assert {buffer.is_pinned() for buffer in backbone.layers._buffers.values()} == {not cached}


def test_the_device_never_holds_all_layers(gpu_device: torch.device, tmp_path: Path) -> None:
    """While loading: embedding and norm, one matrix being quantized, and the staging buffers."""
    on_gpu = gpu_device.type == "cuda"
    folder = tiny_checkpoint(tmp_path, "qwen2", num_hidden_layers=24)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    backbone = load_backbone(folder, device=gpu_device, residency="host")
    layer = packed_nbytes(backbone.blocks[0])
    outer = backbone.embedding.nbytes + backbone.norm_weight.nbytes
    quantizing = 8 * 96 * 64 * 4  # the largest matrix in fp32, and what quantizing it takes
    assert backbone.layers.device_nbytes == 2 * layer
    assert quantizing < 24 * layer / 2, "too few layers to show that they were on the device"
    if on_gpu:
        assert torch.cuda.max_memory_allocated() - before < outer + 2 * layer + quantizing


def test_the_layers_go_with_the_backbone(gpu_device: torch.device) -> None:
    backbone = load_backbone(checkpoint_folder(), device=gpu_device, residency="host")
    buffers = list(backbone.layers._buffers.values())
    states(backbone, 0)
    del backbone  # while the first layer of the next pass may still be copied
    assert not any(buffer.is_pinned() for buffer in buffers)
