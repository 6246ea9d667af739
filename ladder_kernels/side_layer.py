"""A side layer: a narrow pre-norm decoder layer that keeps nothing but its input for backward.

    n = rms_norm(s, attention_norm)                     s [T, S]
    q, k, v = heads of n @ qkv^T, q and k rotated       [T, Hq, d], [T, Hkv, d], [T, Hkv, d]
    u = s + attention(q, k, v) @ attention_out^T
    gate, up = halves of rms_norm(u, mlp_norm) @ gate_up^T
    out = u + (silu(gate) * up) @ mlp_out^T

Kept for backward: s, the parameters and the rotary tables, which all layers share. Backward computes the rest again.
The merge of a tap's projection into the state happens in `tap`, so the state given here is merged and z is never kept.

An autograd function and no `torch.library` op: under a dispatch mode it is plain torch in both directions, which memory
trackers and tracers see through. The sequence of a GPU's kernels is in `ladder_kernels.gpu.side_layer`. On a CPU native
kernels lie between torch's products, of the backward pass in `ladder_kernels.side_layer_backward`; decoding a few rows
there, without a gradient, is two native calls around the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels import elementwise, native, reference
from ladder_kernels.attention import attention
from ladder_kernels.checks import COMPUTE_DTYPES, check_contiguous, check_device, check_dtype, check_like, check_shape
from ladder_kernels.dispatch import runs_eagerly, uses_triton_products, without_autocast
from ladder_kernels.side_layer_backward import side_layer_backward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of rotated query [T, Hq, d], key and value [T, Hkv, d] -> [T, Hq d]."""

# Up to this many rows the native layer computes one after the other, each on one thread: weights have to stay in the
# second-level cache, 2 MiB in fp32.
NATIVE_ROWS = 8
NATIVE_WEIGHTS = 1 << 19
_DTYPES = (*COMPUTE_DTYPES, torch.float64)


class SideLayerWeights(NamedTuple):
    """The parameters of a side layer, all of one dtype: that of the state or fp32, which is rounded where it is used.

    Attributes:
        attention_norm: [S].
        qkv: [(Hq + 2 Hkv) d, S].
        attention_out: [S, Hq d].
        mlp_norm: [S].
        gate_up: [2 F, S], the rows of gate before those of up.
        mlp_out: [S, F].
    """

    attention_norm: Tensor
    qkv: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    mlp_out: Tensor


class SideLayerShape(NamedTuple):
    """What a side layer computes besides its tensors.

    Attributes:
        heads, kv_heads, head_dim: Hq, Hkv and d.
        lengths: rows per document.
        epsilon: of both norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    epsilon: float


class SideLayerCall(NamedTuple):
    """What one call of a side layer needs besides its state and weights.

    Attributes:
        cos, sin: [T, d] in the state's dtype, the rotary table of the rows.
        offsets: int32 [documents + 1] or None, see `attention`.
        shape: see `SideLayerShape`.
        attend: what computes the attention; None for `attention` within each document.
    """

    cos: Tensor
    sin: Tensor
    offsets: Tensor | None
    shape: SideLayerShape
    attend: Attend | None = None

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, Hq d] from rotated heads."""
        if self.attend is not None:
            return self.attend(query, key, value)
        return attention(query, key, value, self.shape.lengths, offsets=self.offsets)


def side_layer(
    state: Tensor,
    weights: SideLayerWeights,
    cos: Tensor,
    sin: Tensor,
    lengths: Sequence[int],
    epsilon: float,
    *,
    offsets: Tensor | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """One side layer over whole documents; differentiable once, in state and weights.

    Args:
        state: [T, S], the merged side state.
        weights: see `SideLayerWeights`; the numbers of heads follow from their shapes. Gradients come in their dtype.
        cos, sin: [T, d] in state.dtype, the rotary table of the rows.
        lengths: rows per document, in order; they sum to T. Host integers.
        epsilon: added to the mean square in both norms.
        offsets: int32 [documents + 1], see `attention`.
        attend: computes the attention in place of `attention`, as cached decoding does. It is called once, so with
            gradients the layer keeps its activations.

    Returns:
        [T, S] in state.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree.
    """
    heads, kv_heads = _check(state, weights, cos, sin, lengths, offsets)
    shape = SideLayerShape(heads, kv_heads, cos.shape[1], tuple(lengths), epsilon)
    call = SideLayerCall(cos, sin, offsets, shape, attend)
    needs_grad = torch.is_grad_enabled() and (state.requires_grad or any(w.requires_grad for w in weights))
    with without_autocast(state.device):
        if torch.compiler.is_compiling() or (needs_grad and attend is not None):
            return plain_side_layer(state, weights, call)
        if needs_grad:
            return _SideLayer.apply(state, *weights, cos, sin, offsets, shape)
        if _runs_native(state, weights):
            return native.side_layer(state, weights, call)
        return _forward(state, weights, call)


class _SideLayer(torch.autograd.Function):
    """`side_layer` that saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, *inputs: Any) -> Tensor:
        *tensors, shape = inputs
        ctx.save_for_backward(state, *tensors)
        ctx.shape = shape
        return _forward(state, SideLayerWeights(*tensors[:6]), SideLayerCall(*tensors[6:], shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        state, *tensors = ctx.saved_tensors
        weights, call = SideLayerWeights(*tensors[:6]), SideLayerCall(*tensors[6:], ctx.shape)
        with without_autocast(dout.device):
            if _runs_triton(state, dout, *weights):
                from ladder_kernels.gpu import side_layer as gpu  # Triton is not installed everywhere

                gradients = gpu.side_layer_backward(dout, state, weights, call)
            elif _has_native_backward(dout, state, *tensors[:-1]):
                gradients = side_layer_backward(dout, state, weights, call, ctx.needs_input_grad[:7])
            else:
                gradients = _plain_backward(dout, state, weights, call, ctx.needs_input_grad[:7])
        return (*gradients, None, None, None, None)


def _forward(state: Tensor, weights: SideLayerWeights, call: SideLayerCall) -> Tensor:
    if _runs_triton(state, *weights):
        from ladder_kernels.gpu import side_layer as gpu  # Triton is not installed everywhere

        return gpu.side_layer(state, weights, call)
    return plain_side_layer(state, weights, call, elementwise)


def plain_side_layer(
    state: Tensor, weights: SideLayerWeights, call: SideLayerCall, operations: ModuleType = reference
) -> Tensor:
    """The layer in torch operations, arguments checked.

    `operations` has rms_norm, rotary and swiglu: `reference`, or `elementwise`, faster where autograd does not look on.
    """
    shape, dtype = call.shape, state.dtype
    attention_norm, qkv, attention_out, mlp_norm, gate_up, mlp_out = (weight.to(dtype) for weight in weights)
    normed = operations.rms_norm(state, attention_norm, shape.epsilon)
    heads = F.linear(normed, qkv).unflatten(-1, (-1, shape.head_dim))
    rotated, value = heads.split((shape.heads + shape.kv_heads, shape.kv_heads), dim=1)
    rotated = operations.rotary(rotated, call.cos, call.sin)
    query, key = rotated.split((shape.heads, shape.kv_heads), dim=1)
    mixed = call.attention(query, key, value)
    state = state + F.linear(mixed, attention_out)
    normed = operations.rms_norm(state, mlp_norm, shape.epsilon)
    gate, up = F.linear(normed, gate_up).chunk(2, dim=-1)
    return state + F.linear(operations.swiglu(gate, up), mlp_out)


def _runs_native(state: Tensor, weights: SideLayerWeights) -> bool:
    """Few rows on a CPU: the time goes to calls, of which the native layer has two, and to rounding fp32 weights."""
    return (
        state.is_cpu
        and 0 < state.shape[0] <= NATIVE_ROWS
        and state.dtype in COMPUTE_DTYPES
        and sum(weight.numel() for weight in weights) <= NATIVE_WEIGHTS
        and runs_eagerly(state, *weights)
        and native.available()
    )


def _has_native_backward(dout: Tensor, state: Tensor, *others: Tensor) -> bool:
    return (
        state.is_cpu
        and state.numel() > 0
        and state.dtype in COMPUTE_DTYPES
        and runs_eagerly(dout, state, *others)
        and native.available()
    )


def _plain_backward(
    dout: Tensor,
    state: Tensor,
    weights: SideLayerWeights,
    call: SideLayerCall,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of state and weights, None where not wanted, by autograd through the layer computed once more."""
    inputs = [t.detach().requires_grad_(needs) for t, needs in zip((state, *weights), needs_grad, strict=True)]
    with torch.enable_grad():
        out = plain_side_layer(inputs[0], SideLayerWeights(*inputs[1:]), call)
    gradients = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], dout))
    return tuple(next(gradients) if needs else None for needs in needs_grad)


def _runs_triton(state: Tensor, *others: Tensor) -> bool:
    """16-bit states only: Triton's fp32 products use no tensor cores, and cuBLAS, through plain torch, is faster."""
    return (
        state.dtype.itemsize == 2
        and state.shape[0] > 0
        and uses_triton_products(state, *others)
        and runs_eagerly(state, *others)
    )


def _check(
    state: Tensor,
    weights: SideLayerWeights,
    cos: Tensor,
    sin: Tensor,
    lengths: Sequence[int],
    offsets: Tensor | None,
) -> tuple[int, int]:
    """Check all inputs; the numbers of query heads and of key heads."""
    op = "side_layer"
    check_shape(op, "state", state, ("T", "S"))
    check_dtype(op, "state", state.dtype, _DTYPES)
    check_contiguous(op, "state", state)
    tokens, width = state.shape
    check_shape(op, "cos", cos, (tokens, "d"))
    for name, weight in zip(weights._fields, weights, strict=True):
        if weight.dim() != 2 and not name.endswith("norm"):
            check_shape(op, name, weight, ("rows", "columns"))
    head_dim, mixed, inner = cos.shape[1], weights.attention_out.shape[1], weights.mlp_out.shape[1]
    if (
        head_dim == 0
        or head_dim % 2
        or mixed % head_dim
        or (kv_rows := weights.qkv.shape[0] - mixed) <= 0
        or kv_rows % (2 * head_dim)
    ):
        raise ValueError(
            f"{op}: expected qkv [(Hq + 2 Hkv) d, S] and attention_out [S, Hq d] for heads of d = {head_dim}, "
            f"got {list(weights.qkv.shape)} and {list(weights.attention_out.shape)}"
        )
    heads, kv_heads = mixed // head_dim, kv_rows // (2 * head_dim)
    if heads % kv_heads:
        raise ValueError(f"{op}: expected query heads that are a multiple of the key heads, got {heads} and {kv_heads}")
    shapes = ((width,), (weights.qkv.shape[0], width), (width, mixed), (width,), (2 * inner, width), (width, inner))
    weight_dtypes = (state.dtype, torch.promote_types(state.dtype, torch.float32))
    check_dtype(op, "weights", weights.qkv.dtype, weight_dtypes)
    check_device(op, "qkv", weights.qkv, state.device)
    for name, weight, expected in zip(weights._fields, weights, shapes, strict=True):
        check_like(op, name, weight, expected, weights.qkv)
        check_contiguous(op, name, weight)
    for name, table in (("cos", cos), ("sin", sin)):
        check_like(op, name, table, cos.shape, state)
        check_contiguous(op, name, table)
    if not lengths or min(lengths) < 0 or sum(lengths) != tokens:
        raise ValueError(f"{op}: expected lengths >= 0 that sum to the {tokens} rows of state, got {list(lengths)}")
    if offsets is not None:
        check_shape(op, "offsets", offsets, (len(lengths) + 1,))
        check_dtype(op, "offsets", offsets.dtype, (torch.int32,))
        check_device(op, "offsets", offsets, state.device)
    return heads, kv_heads
