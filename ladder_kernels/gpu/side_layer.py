"""The kernels of a side layer in order: forward, and backward from the layer's input.

Launches, of any width and whatever the dtype of the parameters (`is_fused` says which layers count as narrow):

    forward     narrow 3    qkv with cast, attention, attention_out + MLP
                wide 5      qkv with cast, attention, attention_out, SwiGLU, mlp_out
    backward    narrow 11   qkv with cast, attention, attention_out, MLP, MLP dx, mixed dx, attention's own 3, qkv dx,
                            weights
                wide 14     as narrow; MLP dx is a product and the norm, qkv dx is the rotation, a product and the norm

Attention's backward is 3 launches of flash attention; two more would add up the gradients of grouped heads, so it is
given a copy of each key and value head per query head, and the rotation adds them up on the way. Shapes and lengths are
host integers and nothing waits for the device, so a CUDA graph can capture both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladder_kernels.gpu import side_config as config
from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.side_backward import (
    _side_mlp_bwd_dx_kernel,
    _side_mlp_bwd_kernel,
    _side_norm_bwd_dx_kernel,
    _side_qkv_bwd_dx_kernel,
    _side_rotary_bwd_kernel,
)
from ladder_kernels.gpu.side_config import KernelConfig, SideSizes
from ladder_kernels.gpu.side_forward import (
    _side_linear_fwd_kernel,
    _side_mlp_fwd_kernel,
    _side_qkv_fwd_kernel,
    _side_swiglu_fwd_kernel,
)
from ladder_kernels.gpu.side_weights import _side_weights_bwd_dw_kernel
from ladder_kernels.side_layer import SideLayerCall, SideLayerWeights

_ALIGNMENT = 64  # elements: every parameter of the rounded copy starts at a multiple of 128 bytes


class _Layer(NamedTuple):
    """What all launches of a layer need: its sizes, its parameters as given and in the state's dtype, where and what it
    computes. Those in the state's dtype have values once `_qkv` was launched."""

    sizes: SideSizes
    given: SideLayerWeights
    weights: SideLayerWeights
    call: SideLayerCall
    tokens: int


def side_layer(state: Tensor, weights: SideLayerWeights, call: SideLayerCall) -> Tensor:
    """The layer's output [T, S]; arguments as of `ladder_kernels.side_layer`, checked."""
    layer = _layer(state, weights, call)
    heads, _ = _qkv(layer, state, for_backward=False)
    mixed = call.attention(*heads)
    if layer.sizes.is_fused:
        return _mlp(layer, state, mixed)
    u = _linear(layer, mixed, layer.weights.attention_out, state)
    return _linear(layer, _swiglu(layer, u), layer.weights.mlp_out, u)


def side_layer_backward(
    dout: Tensor,
    state: Tensor,
    weights: SideLayerWeights,
    call: SideLayerCall,
) -> tuple[Tensor, ...]:
    """Gradients of state, in its dtype, and of the six weights, in theirs."""
    layer = _layer(state, weights, call)
    dout = dout.contiguous()
    heads, normed_s = _qkv(layer, state, for_backward=True)
    query, key, value = (t.requires_grad_() for t in heads)
    with torch.enable_grad():
        mixed = call.attention(query, key, value)
    u = _linear(layer, mixed.detach(), layer.weights.attention_out, state)
    normed_u, activation, dgate_up = _mlp_backward(layer, u, dout)
    du, mlp_partial = _mlp_dx(layer, dgate_up, u, dout)
    dheads = torch.autograd.grad(mixed, (query, key, value), du @ layer.weights.attention_out)
    dqkv, dstate, attention_partial = _qkv_dx(layer, tuple(t.contiguous() for t in dheads), state, du)
    products = (dqkv, normed_s, du, mixed.detach(), dgate_up, normed_u, dout, activation)
    return dstate, *_weight_gradients(layer, products, attention_partial, mlp_partial)


def _layer(state: Tensor, weights: SideLayerWeights, call: SideLayerCall) -> _Layer:
    shape = call.shape
    sizes = SideSizes(state.shape[1], shape.heads, shape.kv_heads, shape.head_dim, weights.mlp_out.shape[1])
    rounded = weights if weights.qkv.dtype == state.dtype else _room_for(weights, state.dtype)
    return _Layer(sizes, weights, rounded, call, state.shape[0])


def _launch(kernel: Any, grid: tuple[int, ...], chosen: KernelConfig, *arguments: Any) -> None:
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}
    launch(kernel, grid, *arguments, **chosen.constants, **options)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _room_for(weights: SideLayerWeights, dtype: torch.dtype) -> SideLayerWeights:
    """Empty weights of these shapes in dtype, views of one buffer."""
    starts, end = [], 0
    for weight in weights:
        starts.append(end)
        end += _blocks(weight.numel(), _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=dtype, device=weights.qkv.device)
    views = [buffer[start : start + w.numel()].view(w.shape) for start, w in zip(starts, weights, strict=True)]
    return SideLayerWeights(*views)


def _qkv(layer: _Layer, state: Tensor, *, for_backward: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """q, k and v [T, heads, d], q and k rotated; for backward one key and value head per query head, and the normed
    state [T, S]. Rounds the parameters if need be."""
    sizes, casts = layer.sizes, layer.given is not layer.weights
    chosen = config.qkv_config(sizes, casts=casts, for_backward=for_backward)
    kv_heads = sizes.kv_heads * chosen.constants["REPEATS"]
    heads = state.new_empty(layer.tokens, sizes.heads + 2 * kv_heads, sizes.head_dim)
    normed = torch.empty_like(state) if for_backward else None
    targets = layer.weights if casts else (None,) * len(layer.weights)
    blocks_m = _blocks(layer.tokens, chosen.constants["BLOCK_M"])
    programs = _blocks(sizes.qkv // 2, chosen.constants["BLOCK_N"])
    if casts:
        programs += _blocks(config.cast_blocks(sizes), blocks_m)
    tensors = (state, layer.call.cos, layer.call.sin, heads, normed, *layer.given, *targets)
    _launch(_side_qkv_fwd_kernel, (programs, blocks_m), chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return heads.split((sizes.heads, kv_heads, kv_heads), dim=1), normed


def _mlp(layer: _Layer, state: Tensor, mixed: Tensor) -> Tensor:
    """The output [T, S] of the layer from the attention's output."""
    chosen = config.mlp_config(layer.sizes)
    out = torch.empty_like(state)
    weights = layer.weights
    tensors = (state, mixed, weights.attention_out, weights.mlp_norm, weights.gate_up, weights.mlp_out, out)
    grid = (_blocks(layer.tokens, chosen.constants["BLOCK_M"]),)
    _launch(_side_mlp_fwd_kernel, grid, chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return out


def _linear(layer: _Layer, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """residual + x @ weight^T."""
    cols, depth = weight.shape
    chosen = config.linear_config(cols, depth)
    out = torch.empty_like(residual)
    grid = (_blocks(layer.tokens, chosen.constants["BLOCK_M"]), _blocks(cols, chosen.constants["BLOCK_N"]))
    _launch(_side_linear_fwd_kernel, grid, chosen, x, weight, residual, out, layer.tokens)
    return out


def _swiglu(layer: _Layer, u: Tensor) -> Tensor:
    """The MLP's activation [T, F]."""
    chosen = config.swiglu_config(layer.sizes)
    activation = u.new_empty(layer.tokens, layer.sizes.inner)
    blocks_n = _blocks(layer.sizes.inner, chosen.constants["BLOCK_N"])
    grid = (_blocks(layer.tokens, chosen.constants["BLOCK_M"]), blocks_n)
    tensors = (u, layer.weights.mlp_norm, layer.weights.gate_up, activation)
    _launch(_side_swiglu_fwd_kernel, grid, chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return activation


def _mlp_backward(layer: _Layer, u: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows [T, S], the activation [T, F], and the gradients of gate and up [T, 2 F]."""
    inner = layer.sizes.inner
    chosen = config.mlp_backward_config(layer.sizes)
    normed, activation = torch.empty_like(u), u.new_empty(layer.tokens, inner)
    dgate_up = u.new_empty(layer.tokens, 2 * inner)
    weights = layer.weights
    tensors = (u, weights.mlp_norm, weights.gate_up, weights.mlp_out, dout, normed, activation, dgate_up)
    grid = (_blocks(layer.tokens, chosen.constants["BLOCK_M"]), _blocks(inner, chosen.constants["BLOCK_N"]))
    _launch(_side_mlp_bwd_kernel, grid, chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return normed, activation, dgate_up


def _mlp_dx(layer: _Layer, dgate_up: Tensor, u: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """du [T, S], and the norm weight's gradient by blocks of rows, fp32 [blocks, S]."""
    weights = layer.weights
    if not layer.sizes.is_fused:
        return _norm_dx(layer, dgate_up @ weights.gate_up, u, weights.mlp_norm, dout)
    chosen = config.mlp_dx_config(layer.sizes)
    blocks = _blocks(layer.tokens, chosen.constants["BLOCK_M"])
    du, partial = torch.empty_like(u), u.new_empty(blocks, layer.sizes.side_dim, dtype=torch.float32)
    tensors = (dgate_up, weights.gate_up, u, weights.mlp_norm, dout, du, partial)
    _launch(_side_mlp_bwd_dx_kernel, (blocks,), chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return du, partial


def _qkv_dx(layer: _Layer, dheads: tuple[Tensor, ...], state: Tensor, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv [T, N] before the rotation, dstate [T, S], and the norm weight's gradient by blocks of rows."""
    sizes, weights = layer.sizes, layer.weights
    dqkv = state.new_empty(layer.tokens, sizes.qkv)
    if not sizes.is_fused:
        chosen = config.rotary_config(sizes)
        block_m, block_n = chosen.constants["BLOCK_M"], chosen.constants["BLOCK_N"]
        of_query, of_others = sizes.mixed // 2, sizes.kv_heads * sizes.head_dim
        grid = (_blocks(layer.tokens, block_m), _blocks(of_query, block_n) + _blocks(of_others, block_n))
        _launch(_side_rotary_bwd_kernel, grid, chosen, *dheads, layer.call.cos, layer.call.sin, dqkv, layer.tokens)
        return dqkv, *_norm_dx(layer, dqkv @ weights.qkv, state, weights.attention_norm, du)
    chosen = config.qkv_dx_config(sizes)
    blocks = _blocks(layer.tokens, chosen.constants["BLOCK_M"])
    dstate, partial = torch.empty_like(state), state.new_empty(blocks, sizes.side_dim, dtype=torch.float32)
    tensors = (
        *dheads,
        layer.call.cos,
        layer.call.sin,
        weights.qkv,
        state,
        weights.attention_norm,
        du,
        dqkv,
        dstate,
        partial,
    )
    _launch(_side_qkv_bwd_dx_kernel, (blocks,), chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return dqkv, dstate, partial


def _norm_dx(layer: _Layer, dnormed: Tensor, x: Tensor, norm: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + dnormed through the norm of x, and the norm weight's gradient by blocks of rows."""
    chosen = config.norm_dx_config(layer.sizes)
    blocks = _blocks(layer.tokens, chosen.constants["BLOCK_M"] * chosen.constants["BLOCKS"])
    dx, partial = torch.empty_like(x), x.new_empty(blocks, layer.sizes.side_dim, dtype=torch.float32)
    tensors = (dnormed, x, norm, residual, dx, partial)
    _launch(_side_norm_bwd_dx_kernel, (blocks,), chosen, *tensors, layer.tokens, layer.call.shape.epsilon)
    return dx, partial


def _weight_gradients(
    layer: _Layer, products: tuple[Tensor, ...], attention_partial: Tensor, mlp_partial: Tensor
) -> tuple[Tensor, ...]:
    sizes = layer.sizes
    chosen = config.weights_config(sizes)
    gradients = tuple(torch.empty_like(weight) for weight in layer.given)
    block_m, block_n = chosen.constants["BLOCK_M"], chosen.constants["BLOCK_N"]
    shapes = [gradient.shape for gradient in gradients if gradient.dim() == 2]
    tiles = sum(_blocks(rows, block_m) * _blocks(cols, block_n) for rows, cols in shapes)
    tiles += 2 * _blocks(sizes.side_dim, block_n)
    counts = (layer.tokens, attention_partial.shape[0], mlp_partial.shape[0])
    tensors = (*products, attention_partial, mlp_partial, *gradients)
    _launch(_side_weights_bwd_dw_kernel, (tiles,), chosen, *tensors, *counts)
    return gradients
