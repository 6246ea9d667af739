"""One side layer, forward and backward, against the same formula in eager torch and through torch.compile.

All three hold fp32 parameters, cast where they are used, and return the gradients of the state and of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_path import kernels_path
from benchmarks.registry import DTYPE_NAMES, TOY, Benchmark, Case, Context, Implementation, Runnable
from benchmarks.shapes import model_shape
from benchmarks.train_step import REDUCTION_FACTOR
from engine.backbone.families import backbone_config
from engine.config import SideDims, side_dims
from engine.model.side_network import SideLayer
from engine.sequence import SequenceLayout, inverse_frequencies, rotary_table
from ladder_kernels.side_layer import SideLayerCall, SideLayerShape, plain_side_layer

Layer = Callable[[Tensor], Tensor]
_EPSILON = 1e-6


def _dims(model: str) -> SideDims:
    return side_dims(backbone_config(model_shape(model).config()), REDUCTION_FACTOR)


def _side_layer(case: Case, context: Context) -> SideLayer:
    layer = SideLayer(_dims(case.model), _EPSILON).to(context.device)
    generator = torch.Generator(context.device).manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.normal_(std=scale, generator=generator)
    return layer


def _tables(case: Case, context: Context) -> tuple[Tensor, Tensor]:
    frequencies = inverse_frequencies(1e6, _dims(case.model).head_dim, context.device)
    positions = torch.arange(case.sizes["tokens"], device=context.device)
    assert case.dtype is not None
    return rotary_table(positions, frequencies, case.dtype)


def _plain(layer: SideLayer, cos: Tensor, sin: Tensor) -> Layer:
    """The layer on one document in plain torch operations, every activation kept by autograd."""
    dims = layer.dims
    shape = SideLayerShape(dims.num_heads, dims.num_kv_heads, dims.head_dim, (cos.shape[0],), layer.eps)
    call = SideLayerCall(cos, sin, None, shape, _causal_attention)
    return lambda state: plain_side_layer(state, layer.weights(), call)


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)
    return mixed[0].transpose(0, 1).flatten(1)


def _step(layer: SideLayer, forward: Layer, case: Case, context: Context) -> Callable[[], Tensor]:
    """Forward and backward from a random gradient; gradients are freed, as before a next step."""
    generator = torch.Generator(context.device).manual_seed(1)
    size = (case.sizes["tokens"], layer.dims.side_dim)
    state, gradient = (torch.randn(size, generator=generator, device=context.device).to(case.dtype) for _ in range(2))
    state.requires_grad_()

    def step() -> Tensor:
        out = forward(state)
        out.backward(gradient)
        state.grad = None
        layer.zero_grad()
        return out.detach()

    return step


def _ours(case: Case, context: Context) -> Runnable:
    layer, tables = _side_layer(case, context), _tables(case, context)
    layout = SequenceLayout.packed([case.sizes["tokens"]], context.device)
    step = _step(layer, lambda state: layer(state, tables, layout, None, 0), case, context)
    return Runnable(step, kernels=kernels_path(context.device))


def _eager(case: Case, context: Context) -> Runnable:
    layer = _side_layer(case, context)
    return Runnable(_step(layer, _plain(layer, *_tables(case, context)), case, context))


def _compiled(case: Case, context: Context) -> Runnable:
    layer = _side_layer(case, context)
    forward = torch.compile(_plain(layer, *_tables(case, context)), dynamic=False)
    return Runnable(_step(layer, forward, case, context))


def _case(name: str, model: str, tokens: int, dtype: torch.dtype, *devices: str) -> Case:
    dims = _dims(model)
    with torch.device("meta"):
        layer = SideLayer(dims, _EPSILON)
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1)
    # Forward 2 per weight and token, backward twice that; causal attention 7 products of tokens^2 / 2 per head.
    attention = 7 * tokens**2 * dims.num_heads * dims.head_dim
    flops = math.prod((6, tokens, weights)) + attention
    sizes = {"tokens": tokens, "side_dim": dims.side_dim, "inner": dims.intermediate_size, "heads": dims.num_heads}
    return Case(name, sizes, dtype, model=model, flops=flops, tokens=tokens, devices=devices)


BENCHMARKS = (
    Benchmark(
        name="side_layer",
        summary="one side layer forward and backward against eager torch and torch.compile",
        cases=tuple(
            _case(f"{model}-t2048-{DTYPE_NAMES[torch.bfloat16]}", model, 2048, torch.bfloat16, "cuda")
            for model in ("Qwen2.5-0.5B", "Qwen2.5-7B")
        ),
        toy=_case(TOY, "toy", 24, torch.float32, "cpu", "cuda"),
        implementations=(
            Implementation("ladder_kernels", _ours, "ours"),
            Implementation("eager", _eager),
            Implementation("compiled", _compiled),
        ),
    ),
)
