"""RMSNorm, rotary embedding and SwiGLU: what lies between the products of a block, bound by memory.

    rms_norm  weight * (x / sqrt(mean(x^2) + epsilon))
    rotary    x * cos + (-x2, x1) * sin,  x1 and x2 the halves of a head (Llama's half-split convention)
    swiglu    silu(gate) * up

Where nobody needs a gradient, one native pass computes on CPU tensors and one Triton kernel on CUDA tensors. Everyone
else gets plain torch, which autograd and tracing see through, so these are functions and no ops of their own. 16-bit
intermediates are rounded in all three as transformers rounds them: the norm before the weight, silu before the product,
products before their sum.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ladder_kernels import native, reference
from ladder_kernels.checks import COMPUTE_DTYPES, check_device, check_dtype, check_no_gradient, check_shape
from ladder_kernels.dispatch import runs_eagerly, uses_triton

_DTYPES = (*COMPUTE_DTYPES, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)) over the last dimension, the mean in at least fp32.

    Args:
        x: [..., D] fp32, bf16, fp16 or fp64.
        weight: [D] in x.dtype.
        epsilon: added to the mean square.

    Returns:
        [..., D] in x.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree.
    """
    if x.dim() == 0:
        raise ValueError("rms_norm: expected x of shape [..., D], got a 0-dim tensor")
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    _check_same("rms_norm", ("x", x), ("weight", weight))
    kernels = _kernels(x, weight)
    if kernels is None or x.numel() == 0:
        return reference.rms_norm(x, weight, epsilon)
    if x.dim() == 2:
        return kernels.rms_norm(x, weight, epsilon)
    return kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, epsilon).view(x.shape)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head by its position's angles.

    Args:
        x: [T, H, d] fp32, bf16, fp16 or fp64, with even d.
        cos, sin: [T, d] in x.dtype.

    Returns:
        [T, H, d] in x.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, or d is odd.
    """
    check_shape("rotary", "x", x, ("T", "H", "d"))
    tokens, _, size = x.shape
    if size % 2:
        raise ValueError(f"rotary: expected heads of even size, got {size}")
    check_shape("rotary", "cos", cos, (tokens, size))
    check_shape("rotary", "sin", sin, (tokens, size))
    _check_same("rotary", ("x", x), ("cos", cos), ("sin", sin))
    kernels = _kernels(x, cos, sin)
    if kernels is None or x.stride(1) != size or not cos.is_contiguous() or not sin.is_contiguous():
        return reference.rotary(x, cos, sin)
    return kernels.rotary(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [T, F] fp32, bf16, fp16 or fp64.

    Returns:
        [T, F] in that dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree.
    """
    _check_swiglu(gate, up)
    kernels = _kernels(gate, up)
    if kernels is None:
        return reference.swiglu(gate, up)
    return kernels.swiglu(gate, up, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device))


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` into the memory of gate, which is returned: without gradients.

    Raises:
        ValueError, TypeError: as `swiglu`, or one of them requires a gradient.
    """
    _check_swiglu(gate, up)
    for name, tensor in (("gate", gate), ("up", up)):
        check_no_gradient("swiglu_", name, tensor, "call swiglu, or this under torch.no_grad()")
    kernels = _kernels(gate, up)
    if kernels is None or not gate.is_contiguous() or _must_not_write(gate, up):
        return gate.copy_(reference.swiglu(gate, up))
    kernels.swiglu(gate, up, gate)
    if not gate.is_inference():
        # The kernel wrote behind autograd's back: whoever saved `gate` for backward must find out.
        torch.autograd.graph.increment_version(gate)
    return gate


def _must_not_write(gate: Tensor, up: Tensor) -> bool:
    """True if they share memory, or torch has to refuse: a tensor of inference mode, outside of it."""
    shares_memory = gate.untyped_storage()._cdata == up.untyped_storage()._cdata
    return shares_memory or (gate.is_inference() and not torch.is_inference_mode_enabled())


def _check_swiglu(gate: Tensor, up: Tensor) -> None:
    check_shape("swiglu", "gate", gate, ("T", "F"))
    check_shape("swiglu", "up", up, gate.shape)
    _check_same("swiglu", ("gate", gate), ("up", up))


def _check_same(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    name, x = first
    check_dtype(op, name, x.dtype, _DTYPES)
    for name, tensor in others:
        check_dtype(op, name, tensor.dtype, (x.dtype,))
        check_device(op, name, tensor, x.device)


def _kernels(x: Tensor, *others: Tensor) -> ModuleType | None:
    """The module that computes this in one pass: plain tensors, rows in one piece, no gradient. None: plain torch."""
    needs_grad = torch.is_grad_enabled()
    if x.dtype == torch.float64 or (needs_grad and x.requires_grad) or x.stride(-1) != 1:
        return None
    for tensor in others:
        if tensor.stride(-1) != 1 or (needs_grad and tensor.requires_grad):
            return None
    if not runs_eagerly(x, *others):
        return None
    if uses_triton(x):
        from ladder_kernels.gpu import elementwise

        return elementwise
    return native if x.is_cpu and native.available() else None
