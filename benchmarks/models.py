"""Whole models of a shape with random weights: loaded from a checkpoint on a CPU, built in device memory on a GPU.

On a GPU nothing is written, quantized or copied: a 7B of random codes and scales is there in seconds. Both sides get
the tensors that `shapes.random_tensors` draws, in bitsandbytes' layout, so they hold the same weights either way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.qlora import load_nf4_model
from benchmarks.registry import Case, Context
from benchmarks.shapes import ModelShape, model_shape, random_tensors
from engine.backbone import Backbone, load_backbone
from engine.backbone.block import Block
from engine.backbone.families import backbone_config, expected_tensors
from engine.backbone.layout import PackedBlock, pack
from engine.backbone.loader import assemble_block, with_layers
from engine.backbone.residency import Layers, Placement, place
from engine.dtypes import compute_dtype
from ladder_kernels import NF4Weight
from ladder_kernels.head import HeadWeight


def case_backbone(case: Case, context: Context) -> Backbone:
    """Our backbone of the case's model, in the compute dtype of the device."""
    if context.device.type == "cuda":
        return random_backbone(model_shape(case.model, case.sizes["vocab"]), context.device)
    return load_backbone(context.folder / case.name, device=context.device)


def case_nf4_model(case: Case, context: Context, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights as transformers and bitsandbytes run them, multiplying in `dtype`."""
    if context.device.type == "cuda":
        return random_nf4_model(model_shape(case.model, case.sizes["vocab"]), context.device, dtype)
    return load_nf4_model(context.folder / case.name, context.device, dtype)


def random_backbone(
    shape: ModelShape, device: torch.device, seed: int = 0, placement: Placement | None = None
) -> Backbone:
    """A backbone of that shape on `device`; it has no folder, so no tokenizer and no fingerprint.

    Layers that are not placed directly, as they are by default, are packed into host memory one after the other.
    """
    placement = placement or Placement()
    hf_config, dtype = shape.config(), compute_dtype(device)
    config = backbone_config(hf_config)
    expected = expected_tensors(config)
    loaded: dict[str, HeadWeight] = {}
    blocks: list[Block] = []
    packed: list[PackedBlock] = []
    for index, tensors in enumerate(random_tensors(shape, torch.Generator(device).manual_seed(seed))):
        for name in tensors.keys() & expected.keys():
            is_packed = expected[name].linear
            loaded[name] = NF4Weight.from_bitsandbytes(tensors, name) if is_packed else tensors[name].to(dtype)
        if index < config.num_layers:
            block = assemble_block(config, index, loaded)
            if placement.is_direct:
                blocks.append(block)
            else:
                packed.append(pack(block))
    layers = Layers(blocks, device) if placement.is_direct else place(packed, device, placement)
    return Backbone(config, hf_config, *with_layers(config, loaded, layers))


def random_nf4_model(shape: ModelShape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """What transformers makes of such a checkpoint: bitsandbytes linears in the blocks, the rest in bf16."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    for tensors in random_tensors(shape, torch.Generator(device).manual_seed(seed)):
        for name in tensors:
            path, _, leaf = name.rpartition(".")
            if f"{name}.absmax" in tensors:
                _set_nf4_linear(model, path, name, tensors, dtype)
            elif leaf == "weight" or (leaf == "bias" and f"{path}.weight.absmax" not in tensors):
                setattr(model.get_submodule(path), leaf, nn.Parameter(tensors[name], requires_grad=False))
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what peft asks before it wraps bitsandbytes' linears
    return model.to(device)


def _set_nf4_linear(model: nn.Module, path: str, name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the linear at `path` by bitsandbytes' with the packed weight `name`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    dense = model.get_submodule(path)
    parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
    layer = Linear4bit(
        dense.in_features, dense.out_features, dense.bias is not None, dtype, quant_type="nf4", device="meta"
    )
    packed = tensors[name]
    layer.weight = Params4bit.from_prequantized(packed, parts, device=packed.device, module=layer)
    if dense.bias is not None:
        layer.bias = nn.Parameter(tensors[f"{path}.bias"], requires_grad=False)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
