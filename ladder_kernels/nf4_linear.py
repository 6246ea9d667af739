"""out = x @ dequantize(W)^T + bias for a frozen NF4 weight.

x [..., K], W NF4 [N, K], bias [N] -> out [..., N], all in x.dtype. For few tokens a native kernel multiplies packed
weights as it reads them. For more, W is decoded panel by panel along N into reused scratch and each panel is
multiplied straight into its columns of out: the whole matrix never exists. On a CPU without 16-bit units the products
of 16-bit tensors are computed in fp32, from the same rounded weights. `launch.linear_plan` chooses, on a GPU
`launch.gpu_linear_plan`. `nf4_swiglu` is silu(x @ W_gate^T) * (x @ W_up^T), on a GPU in one kernel where planned so.
Forward only, with nothing to save; `frozen_linear` is the same with a gradient.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.checks import (
    check_like,
    check_nf4,
    check_nf4_linear,
    check_no_gradient,
    check_scratch,
    check_shape,
)
from ladder_kernels.dispatch import runs_eagerly, uses_triton
from ladder_kernels.elementwise import swiglu_
from ladder_kernels.launch import FEW_TOKENS, GpuLinearPlan, LinearPlan, linear_plan, wide_scratch
from ladder_kernels.nf4 import NF4Weight, dequantize_rows
from ladder_kernels.nf4_tensors import NF4_SCHEMA, NF4Tensors
from ladder_kernels.panels import panel_linear
from ladder_kernels.workspace import Workspace

_INSTEAD = "call it under torch.no_grad(), or frozen_linear where gradients shall pass through to x"


def _plan(x: Tensor, rows: int, nf4: NF4Tensors, half_precision: bool = False) -> LinearPlan | GpuLinearPlan:
    if uses_triton(x):
        from ladder_kernels.gpu import nf4_linear as gpu

        return gpu.linear_plan_for(x, rows, nf4, half_precision=half_precision)
    *leading, cols = x.shape
    isa = native.isa() if x.is_cpu else None
    return linear_plan(math.prod(leading), rows, cols, nf4.block_size, x.dtype.itemsize, isa)


def _any_plan_bytes(x: Tensor, rows: int, nf4: NF4Tensors) -> int:
    """Scratch that is enough whatever library the op will find: the compiler must not look for it."""
    if uses_triton(x):
        return _plan(x, rows, nf4).scratch_bytes
    *leading, cols = x.shape
    size = (math.prod(leading), rows, cols, nf4.block_size, x.dtype.itemsize)
    return max(linear_plan(*size, isa).scratch_bytes for isa in (None, *FEW_TOKENS))


def _multiply(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    scratch: Tensor,
    nf4: NF4Tensors,
    plan: LinearPlan | GpuLinearPlan,
    half_precision: bool = False,
) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = x.new_empty(flat.shape[0], rows)
    if isinstance(plan, GpuLinearPlan):
        from ladder_kernels.gpu import nf4_linear as gpu

        bias, added = _contiguous(bias), _contiguous(residual, out.shape)
        gpu.nf4_linear(flat.contiguous(), nf4, bias, added, plan, scratch, out, half_precision=half_precision)
        residual = None
    elif plan.panel_rows is None:
        bias, added = _contiguous(bias), _contiguous(residual, out.shape)
        native.nf4_linear(flat.contiguous(), bias, added, nf4, scratch, out)
        residual = None
    elif plan.wide_tokens:
        _multiply_wide_panels(flat, bias, scratch, nf4, plan, out)
    else:
        panels = scratch[: plan.scratch_bytes].view(x.dtype).view(1, plan.panel_rows, x.shape[-1])
        panel_linear(flat, functools.partial(dequantize_rows, nf4), bias, panels, out)
    out = out if x.dim() == 2 else out.view(*x.shape[:-1], rows)
    return out if residual is None else out.add_(residual)


def _contiguous(tensor: Tensor | None, shape: torch.Size | None = None) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor if shape is None else tensor.reshape(shape)).contiguous()


def _multiply_wide_panels(
    flat: Tensor, bias: Tensor | None, scratch: Tensor, nf4: NF4Tensors, plan: LinearPlan, out: Tensor
) -> None:
    (tokens, cols), rows, panel_rows = flat.shape, out.shape[1], plan.panel_rows or 0
    sizes = wide_scratch(panel_rows, cols, plan.wide_tokens)
    panel, wide_x, wide_out = (part.view(torch.float32) for part in scratch[: plan.scratch_bytes].split(sizes))
    wide_bias = None if bias is None else bias.float()
    for begin in range(0, rows, panel_rows):
        end = min(begin + panel_rows, rows)
        part = panel[: (end - begin) * cols].view(end - begin, cols)
        native.dequantize_nf4(nf4, begin, part, rounded_to=flat.dtype)
        for first in range(0, tokens, plan.wide_tokens):
            last = min(first + plan.wide_tokens, tokens)
            x = wide_x[: (last - first) * cols].view(last - first, cols)
            if begin == 0 or tokens > plan.wide_tokens:  # else it still holds all rows
                x.copy_(flat[first:last])
            product = wide_out[: (last - first) * (end - begin)].view(last - first, end - begin)
            if wide_bias is None:
                torch.mm(x, part.T, out=product)
            else:
                torch.addmm(wide_bias[begin:end], x, part.T, out=product)
            out[first:last, begin:end] = product


@torch.library.custom_op(
    "ladder::nf4_linear",
    mutates_args=("scratch",),
    schema=f"(Tensor x, Tensor? bias, int rows, Tensor(a!) scratch, {NF4_SCHEMA}) -> Tensor",
)
def _nf4_linear(x: Tensor, bias: Tensor | None, rows: int, scratch: Tensor, *nf4: Any) -> Tensor:
    tensors = NF4Tensors(*nf4)
    return _multiply(x, bias, None, rows, scratch, tensors, _checked_plan(x, bias, rows, scratch, tensors))


@_nf4_linear.register_fake
def _(x: Tensor, bias: Tensor | None, rows: int, scratch: Tensor, *nf4: Any) -> Tensor:
    _checked_plan(x, bias, rows, scratch, NF4Tensors(*nf4))
    return x.new_empty(*x.shape[:-1], rows)


def _checked_plan(
    x: Tensor, bias: Tensor | None, rows: int, scratch: Tensor, nf4: NF4Tensors
) -> LinearPlan | GpuLinearPlan:
    check_nf4("nf4_linear", nf4)
    if x.dim() == 0 or rows < 0:
        raise ValueError(f"nf4_linear: expected x of shape [..., K] and rows >= 0, got {list(x.shape)} and {rows}")
    check_nf4_linear(x, bias, rows, nf4)
    plan = _plan(x, rows, nf4)
    check_scratch("nf4_linear", scratch, plan.scratch_bytes, x.device)
    return plan


def nf4_linear(
    x: Tensor,
    nf4_weight: NF4Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    allow_fp16_sums: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """x @ dequantize(nf4_weight)^T + bias, computed in x.dtype (few tokens on a CPU: products and sums in fp32).

    Args:
        x: [..., K] fp32, bf16 or fp16.
        nf4_weight: [N, K].
        bias: [N] in x.dtype.
        residual: [..., N] in x.dtype, added to the rounded result.
        allow_fp16_sums: GeForce cards with x in fp16 may sum up to 128 columns at a time in fp16, at twice the speed. A
            sum of so few that leaves fp16 becomes infinite. Other devices sum in fp32 all the same.
        workspace: keeps the scratch (a decode panel of about 32 MiB, at least 64 rows, on a GPU two; 512 rows in fp32
            where products of 16 bits are computed so) between calls. Without one it is allocated for this call.

    Returns:
        [..., N] in x.dtype, a new tensor.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, or x, bias or residual requires a gradient.
    """
    for name, tensor in (("x", x), ("bias", bias), ("residual", residual)):
        check_no_gradient("nf4_linear", name, tensor, _INSTEAD)
    rows, cols = nf4_weight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"nf4_linear: expected x of shape [..., {cols}], got {list(x.shape)}")
    nf4 = nf4_weight.tensors
    check_nf4_linear(x, bias, rows, nf4)
    if residual is not None:
        check_like("nf4_linear", "residual", residual, (*x.shape[:-1], rows), x)
    workspace = Workspace() if workspace is None else workspace
    if torch.compiler.is_compiling():
        scratch = workspace.take("nf4_linear", (_any_plan_bytes(x, rows, nf4),), torch.uint8, x.device)
        out = _nf4_linear(x, bias, rows, scratch, *nf4)
        return out if residual is None else out + residual
    plan = _plan(x, rows, nf4, allow_fp16_sums)
    scratch = workspace.take("nf4_linear", (plan.scratch_bytes,), torch.uint8, x.device)
    if not runs_eagerly(x, bias, residual, scratch, nf4.packed):
        out = _nf4_linear(x, bias, rows, scratch, *nf4)
        return out if residual is None else out + residual
    return _multiply(x, bias, residual, rows, scratch, nf4, plan, allow_fp16_sums)


def nf4_swiglu(
    x: Tensor,
    gate_weight: NF4Weight,
    up_weight: NF4Weight,
    *,
    allow_fp16_sums: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """silu(x @ gate_weight^T) * (x @ up_weight^T), both products and silu rounded to x.dtype.

    Args:
        x: [T, K] fp32, bf16 or fp16.
        gate_weight, up_weight: [N, K].
        allow_fp16_sums, workspace: as for `nf4_linear`.

    Returns:
        [T, N] in x.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, or x requires a gradient.
    """
    check_shape("nf4_swiglu", "x", x, ("T", gate_weight.shape[1]))
    if up_weight.shape != gate_weight.shape:
        raise ValueError(f"nf4_swiglu: expected up_weight of shape {gate_weight.shape}, got {up_weight.shape}")
    workspace = Workspace() if workspace is None else workspace
    if uses_triton(x) and runs_eagerly(x, gate_weight.packed, up_weight.packed):
        out = _fused_swiglu(x, gate_weight, up_weight, workspace, allow_fp16_sums)
        if out is not None:
            return out
    gate = nf4_linear(x, gate_weight, allow_fp16_sums=allow_fp16_sums, workspace=workspace)
    return swiglu_(gate, nf4_linear(x, up_weight, allow_fp16_sums=allow_fp16_sums, workspace=workspace))


def _fused_swiglu(
    x: Tensor, gate_weight: NF4Weight, up_weight: NF4Weight, workspace: Workspace, allow_fp16_sums: bool
) -> Tensor | None:
    """None where one kernel cannot do it, or two products and a third pass are planned to be faster."""
    from ladder_kernels.gpu import nf4_linear as gpu

    rows, gate, up = gate_weight.shape[0], gate_weight.tensors, up_weight.tensors
    check_no_gradient("nf4_swiglu", "x", x, _INSTEAD)
    check_nf4_linear(x, None, rows, gate)
    check_nf4_linear(x, None, rows, up)
    if gate.block_size != up.block_size or gate_weight.double_quant != up_weight.double_quant:
        return None
    plan = gpu.linear_plan_for(x, rows, gate, is_pair=True, half_precision=allow_fp16_sums)
    if plan.config is None:
        return None
    scratch = workspace.take("nf4_linear", (plan.scratch_bytes,), torch.uint8, x.device)
    out = x.new_empty(x.shape[0], rows)
    gpu.nf4_swiglu(x.contiguous(), gate, up, plan, scratch, out, half_precision=allow_fp16_sums)
    return out
