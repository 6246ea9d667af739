"""The tracker counts what is held, no more and no less, and a training step leaves nothing behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks.shapes import ModelShape
from benchmarks.tracked_qlora import QLoRA, track_qlora
from benchmarks.tracked_step import track_ladder
from benchmarks.tracker import ACTIVATIONS, HOST, StorageTracker, gpu_code
from engine.config import LadderConfig
from ladder_kernels import dispatch, nf4_linear

SMALL = ModelShape("qwen2", 256, 704, 3, 4, 2, 64, 4096, False, 4096, 1e-6, 1e6)
CONFIG = LadderConfig.preset("ladder", reduction_factor=4)


def test_storages_are_counted_once_and_dropped() -> None:
    """Views and in-place results share a storage; a temporary counts while it lives; a part follows its label."""
    tracker = StorageTracker()
    with FakeTensorMode(), tracker:
        with tracker.making("weights"):
            weight = torch.empty(1000)
        with tracker.phase("work"):
            view = weight.view(10, 100)[2:]
            view.add_(1)
            doubled = weight * 2
            total = (doubled + 1).sum()
            tracker.label(doubled, "kept", only_from=ACTIVATIONS)
            tracker.label(weight, "kept", only_from=ACTIVATIONS)
        assert tracker.live == {"weights": 4000, "kept": 4000, ACTIVATIONS: 4}
        # weight, doubled and doubled + 1 are there when the sum is made.
        assert tracker.peaks["work"].device_bytes == 3 * 4000 + 4
        assert tracker.peak.parts == {"weights": 4000, ACTIVATIONS: 8004}
        del weight, view, doubled, total
        assert set(tracker.live.values()) == {0}


def test_a_phase_starts_with_what_is_held() -> None:
    tracker = StorageTracker()
    with FakeTensorMode(), tracker:
        dropped = torch.empty(100)
        del dropped
        held = torch.empty(50)
        with tracker.phase("later"):
            held.add_(1)
    assert tracker.peaks["later"].device_bytes == 200
    assert list(tracker.peaks) == ["later"]


def test_host_memory_has_its_own_account() -> None:
    tracker = StorageTracker()
    with FakeTensorMode(), tracker, tracker.phase("work"):
        with tracker.making(HOST):
            table = torch.empty(1000)
        rows = torch.empty(10)
        assert tracker.live_host == 4000 and sum(tracker.live.values()) == 40
        del table
        assert tracker.live_host == 0
        del rows
    assert tracker.peak.host_bytes == 4000
    assert tracker.peak.device_bytes == 40


def test_the_path_of_a_gpu_is_left_again() -> None:
    before = (dispatch.uses_triton, nf4_linear.__globals__["uses_triton"], dispatch.runs_eagerly)
    with gpu_code():
        assert dispatch.uses_triton(torch.empty(1))
    assert (dispatch.uses_triton, nf4_linear.__globals__["uses_triton"], dispatch.runs_eagerly) == before
    assert not dispatch.uses_triton(torch.empty(1))


def test_live_bytes_of_the_backbone_pass_are_flat_in_depth() -> None:
    """Above weights, taps and side states a pass of 12 blocks holds what a pass of 4 does, to the byte."""
    above = []
    for layers in (4, 12):
        shape = dataclasses.replace(SMALL, num_layers=layers)
        tracker = track_ladder(shape.config(), CONFIG, 640)
        above.append(tracker.peaks["backbone pass"].parts[ACTIVATIONS])
        assert tracker.live[ACTIVATIONS] == 0
        assert tracker.live["taps"] == tracker.live["side states"] == tracker.live["gradients"] == 0
    assert above[0] == above[1] > 0


@pytest.mark.parametrize("checkpointing", [True, False])
def test_qlora_keeps_what_it_is_told_to(checkpointing: bool) -> None:
    """Two more blocks cost their inputs with checkpointing, and several times that without."""
    hidden = 2 * 640 * SMALL.hidden_size
    grown = []
    for layers in (1, 3):
        shape = dataclasses.replace(SMALL, num_layers=layers)
        tracker = track_qlora(shape.config(), QLoRA(checkpointing, has_our_loss=True), 640)
        grown.append(tracker.peaks["forward"].parts[ACTIVATIONS])
    kept = (grown[1] - grown[0]) / 2 / hidden
    assert 0.99 < kept < 1.5 if checkpointing else kept > 10
