"""Taps that start as a basis of what blocks read: its formula in fp64, for every place a backbone can have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ladders import batch, checkpoint_folder, ladder_model, tiny_backbone
from torch import Tensor

from engine.backbone import Backbone, load_backbone
from engine.backbone.block import Linear
from engine.config import LadderConfig
from engine.model.causal_lm import LadderForCausalLM
from engine.model.tap_basis import tap_basis
from ladder_kernels import NF4Weight, dequantize_nf4


def based(backbone: Backbone, preset: str = "ladder", **changed: object) -> LadderForCausalLM:
    return ladder_model(preset, backbone, **({"tap_init": "basis", "reduction_factor": 2} | changed))


def dense(linear: Linear) -> Tensor:
    weight = linear.weight
    return (dequantize_nf4(weight, torch.float32) if isinstance(weight, NF4Weight) else weight).double()


def stacked_readers(backbone: Backbone) -> Tensor:
    """Every matrix that reads hidden states, at length one."""
    stacked = []
    for block in backbone.blocks:
        for norm, linears in (
            (block.attention_norm, (block.query, block.key, block.value)),
            (block.mlp_norm, (block.gate, block.up)),
        ):
            scaled = [dense(linear) * norm for linear in linears]
            stacked += [weight / weight.norm() for weight in scaled]
    return torch.cat(stacked)


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("family", ["llama2", "qwen2", "qwen3"])
def test_the_basis_is_the_right_singular_vectors_of_what_reads(family: str, quantize: bool) -> None:
    backbone = tiny_backbone(family, quantize=quantize)
    size = backbone.config.hidden_size // 2
    basis, truth = tap_basis(backbone, size).double(), torch.linalg.svd(stacked_readers(backbone)).Vh[:size]
    torch.testing.assert_close((basis * truth).sum(1).abs(), torch.ones(size).double(), rtol=0, atol=1e-4)
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()
    for tap in based(backbone, "lst").side_network.all_taps:
        assert torch.equal(tap.weight.double()[:size], basis[: len(tap.weight)])


def test_a_matrix_of_zeros_is_left_out() -> None:
    backbone = load_backbone(checkpoint_folder("llama2"), dtype=torch.float32, quantize=False)
    backbone.blocks[0].query.weight.zero_()
    assert tap_basis(backbone, 8).isfinite().all()


@pytest.mark.parametrize("preset", ["ladder", "rejoin"])
def test_everything_but_the_taps_is_drawn_as_ever(preset: str) -> None:
    backbone = tiny_backbone()
    ours = based(backbone, preset).side_network.state_dict()
    drawn = based(backbone, preset, tap_init="random").side_network.state_dict()
    changed = [name for name in ours if not torch.equal(ours[name], drawn[name])]
    assert changed and all(name.startswith("taps.") and name.endswith(".weight") for name in changed)


def test_step_zero_is_the_backbone() -> None:
    with torch.no_grad():
        losses = [
            float(model(batch(2, 9), labels=batch(2, 9)).loss)
            for model in (based(tiny_backbone()), based(tiny_backbone(), tap_init="random"))
        ]
    assert losses[0] == losses[1]


def test_a_side_network_wider_than_the_backbone_keeps_random_rows_beyond_it() -> None:
    """S is rounded up to 32."""
    backbone = tiny_backbone()
    width = backbone.config.hidden_size
    side = LadderConfig(tap_init="basis", reduction_factor=1)
    assert tap_basis(backbone, width + 32).shape == (width, width)
    weight = LadderForCausalLM.from_backbone(backbone, side).side_network.taps[0].weight.detach()[:width]
    torch.testing.assert_close(weight @ weight.T, torch.eye(width), rtol=0, atol=1e-4)


@pytest.mark.parametrize("residency", ["host", "device"])
def test_streamed_layers_give_the_same_bits(residency: str) -> None:
    placed = load_backbone(checkpoint_folder(), dtype=torch.float32, residency=residency)
    assert torch.equal(tap_basis(placed, 32), tap_basis(tiny_backbone(), 32))


def test_a_saved_adapter_is_loaded_without_looking_at_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = based(tiny_backbone())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("engine.model.causal_lm.start_at_basis", lambda *_: pytest.fail("looked"))
    again = LadderForCausalLM.from_pretrained(tmp_path, tiny_backbone())
    saved = model.side_network.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in again.side_network.state_dict().items())


def test_taps_without_such_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="tap_down='adapter'"):
        LadderConfig(tap_init="basis", tap_down="adapter")
    with pytest.raises(ValueError, match="tap_init must be one of random, basis"):
        LadderConfig(tap_init="svd")
