"""RMSNorm, rotary embedding and SwiGLU: what lies between the products of a block, bound by memory.

    rms_norm  weight * (x / sqrt(mean(x^2) + epsilon))
    rotary    x * cos + (-x2, x1) * sin,  x1 and x2 the halves of a head (Llama's half-split convention)
    swiglu    silu(gate) * up

Where nobody needs a gradient, CPU tensors go through one native pass. Everyone else gets plain torch, which autograd,
tracing and other devices see through, so these are functions and no ops of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladder_kernels import native, reference
from ladder_kernels.checks import COMPUTE_DTYPES, check_shape
from ladder_kernels.dispatch import runs_eagerly


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)) over the last dimension.

    Computed in at least fp32; the quotient is rounded to x.dtype before the product, as transformers does.

    Args:
        x: [..., D].
        weight: [D] in x.dtype.
        epsilon: added to the mean square.

    Returns:
        [..., D] in x.dtype.

    Raises:
        ValueError: weight has another shape.
    """
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    if _runs_native(x, weight) and x.numel() > 0:
        if x.dim() == 2:
            return native.rms_norm(x, weight, epsilon)
        return native.rms_norm(x.reshape(-1, x.shape[-1]), weight, epsilon).view(x.shape)
    return reference.rms_norm(x, weight, epsilon)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head by its position's angles.

    Args:
        x: [T, H, d] with even d.
        cos, sin: [T, d] in x.dtype.

    Returns:
        [T, H, d] in x.dtype.

    Raises:
        ValueError: shapes disagree, or d is odd.
    """
    check_shape("rotary", "x", x, ("T", "H", "d"))
    if x.shape[2] % 2:
        raise ValueError(f"rotary: expected heads of even size, got {x.shape[2]}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape("rotary", name, table, (x.shape[0], x.shape[2]))
    if _runs_native(x, cos, sin) and x.stride(1) == x.shape[2] and cos.is_contiguous() and sin.is_contiguous():
        return native.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, silu rounded to the dtype before the product.

    Args:
        gate, up: [T, F].
        out: where to write, without a gradient: gate itself, or a contiguous tensor of that shape and dtype that
            overlaps neither.

    Returns:
        [T, F] in gate.dtype: out, if given.

    Raises:
        ValueError: shapes disagree.
    """
    check_shape("swiglu", "gate", gate, ("T", "F"))
    check_shape("swiglu", "up", up, gate.shape)
    if _runs_native(gate, up) and (out is None or out.is_contiguous()):
        return native.swiglu(
            gate, up, torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
        )
    result = reference.swiglu(gate, up)
    return result if out is None else out.copy_(result)


def _runs_native(x: Tensor, *others: Tensor) -> bool:
    """True if one native pass can compute this: plain CPU tensors of one dtype, rows in one piece, no gradient."""
    dtype, needs_grad = x.dtype, torch.is_grad_enabled()
    if not x.is_cpu or dtype not in COMPUTE_DTYPES or (needs_grad and x.requires_grad) or x.stride(-1) != 1:
        return False
    for tensor in others:
        if tensor.dtype != dtype or not tensor.is_cpu or (needs_grad and tensor.requires_grad):
            return False
        if tensor.stride(-1) != 1:
            return False
    return runs_eagerly(x, *others) and native.available()
