"""Gradients that come down through frozen NF4 blocks on a card, with layers there and streamed."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from ladders import batch, checkpoint_folder, ladder_model, tiny_backbone, trained
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor

from engine.backbone import Backbone, load_backbone
from engine.backbone.block import Block, Linear
from engine.backbone.residency import Layers
from ladder_kernels import NF4Weight, dequantize_nf4

pytestmark = pytest.mark.gpu


def decoded(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """The same function in plain torch: every linear dense, in a dtype that may be wider."""

    def dense(block: Block) -> Block:
        values = {field.name: getattr(block, field.name) for field in fields(block)}
        linears = {
            name: Linear(dequantize_nf4(linear.weight, torch.float32).to(dtype), linear.bias)
            for name, linear in values.items()
            if isinstance(linear, Linear) and isinstance(linear.weight, NF4Weight)
        }
        return replace(block, **linears).map(lambda tensor: tensor.to(dtype))

    layers = Layers([dense(block) for block in backbone.blocks], backbone.device)
    outer = (tensor.to(dtype) for tensor in (backbone.norm_weight, backbone.head_weight))
    return Backbone(backbone.config, backbone.hf_config, backbone.embedding.to(dtype), layers, *outer)


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    model, ids = trained(ladder_model("rejoin", backbone)), batch(1, 70).to(backbone.device)
    if backbone.dtype == torch.float64:
        model.double()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def test_gradients_obey_the_tolerance_rule_and_streaming_changes_no_bit() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_backbone(checkpoint_folder(), dtype=torch.bfloat16, device=device)
    truth = gradients(decoded(tiny_backbone(dtype=torch.bfloat16), torch.float64))
    plain = gradients(decoded(loaded, torch.bfloat16))
    resident = gradients(loaded)
    for name, gradient in resident.items():
        assert_close_to_truth(name, gradient, truth[name], plain[name])
    streamed = load_backbone(checkpoint_folder(), dtype=torch.bfloat16, device=device, residency="host")
    for name, gradient in gradients(streamed).items():
        assert_same_bits(name, gradient, resident[name])
