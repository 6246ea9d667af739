"""out = x @ dequantize(W)^T + bias for a frozen NF4 weight.

x [..., K], W NF4 [N, K], bias [N] -> out [..., N], all in x.dtype. For few tokens a native kernel multiplies packed
weights as it reads them. For more, W is decoded panel by panel along N into reused scratch and each panel is
multiplied straight into its columns of out: the whole matrix never exists. On a CPU without 16-bit units the products
of 16-bit tensors are computed in fp32, from the same rounded weights. `launch.linear_plan` chooses. Forward only: the
backbone runs without gradients, so there is nothing to save.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ladder_kernels import native
from ladder_kernels.checks import check_nf4, check_nf4_linear, check_no_gradient, check_scratch
from ladder_kernels.dispatch import runs_eagerly
from ladder_kernels.launch import FEW_TOKENS, LinearPlan, linear_plan, wide_scratch
from ladder_kernels.nf4 import NF4Weight, dequantize_rows
from ladder_kernels.nf4_tensors import NF4_SCHEMA, NF4Tensors
from ladder_kernels.workspace import Workspace


def _plan(x: Tensor, rows: int, nf4: NF4Tensors) -> LinearPlan:
    *leading, cols = x.shape
    isa = native.isa() if x.is_cpu else None
    return linear_plan(math.prod(leading), rows, cols, nf4.block_size, x.dtype.itemsize, isa)


def _any_plan_bytes(x: Tensor, rows: int, nf4: NF4Tensors) -> int:
    """Scratch that is enough whatever library the op will find: the compiler must not look for it."""
    *leading, cols = x.shape
    size = (math.prod(leading), rows, cols, nf4.block_size, x.dtype.itemsize)
    return max(linear_plan(*size, isa).scratch_bytes for isa in (None, *FEW_TOKENS))


def _multiply(x: Tensor, bias: Tensor | None, rows: int, scratch: Tensor, nf4: NF4Tensors, plan: LinearPlan) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = x.new_empty(flat.shape[0], rows)
    if plan.panel_rows is None:
        native.nf4_linear(flat.contiguous(), None if bias is None else bias.contiguous(), nf4, scratch, out)
    elif plan.wide_tokens:
        _multiply_wide_panels(flat, bias, scratch, nf4, plan, out)
    else:
        panel = scratch[: plan.scratch_bytes].view(x.dtype).view(plan.panel_rows, x.shape[-1])
        _multiply_panels(flat, bias, panel, nf4, out)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], rows)


def _multiply_panels(flat: Tensor, bias: Tensor | None, panel: Tensor, nf4: NF4Tensors, out: Tensor) -> None:
    rows = out.shape[1]
    for begin in range(0, rows, panel.shape[0]):
        end = min(begin + panel.shape[0], rows)
        part = panel[: end - begin]
        dequantize_rows(nf4, begin, part)
        if bias is None:
            torch.mm(flat, part.T, out=out[:, begin:end])
        else:
            torch.addmm(bias[begin:end], flat, part.T, out=out[:, begin:end])


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
            x = wide_x[: (last - first) * cols].view(last - first, cols).copy_(flat[first:last])
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
    return _multiply(x, bias, rows, scratch, tensors, _checked_plan(x, bias, rows, scratch, tensors))


@_nf4_linear.register_fake
def _(x: Tensor, bias: Tensor | None, rows: int, scratch: Tensor, *nf4: Any) -> Tensor:
    _checked_plan(x, bias, rows, scratch, NF4Tensors(*nf4))
    return x.new_empty(*x.shape[:-1], rows)


def _checked_plan(x: Tensor, bias: Tensor | None, rows: int, scratch: Tensor, nf4: NF4Tensors) -> LinearPlan:
    check_nf4("nf4_linear", nf4)
    if x.dim() == 0 or rows < 0:
        raise ValueError(f"nf4_linear: expected x of shape [..., K] and rows >= 0, got {list(x.shape)} and {rows}")
    check_nf4_linear(x, bias, rows, nf4)
    plan = _plan(x, rows, nf4)
    check_scratch("nf4_linear", scratch, plan.scratch_bytes, x.device)
    return plan


def nf4_linear(
    x: Tensor, nf4_weight: NF4Weight, bias: Tensor | None = None, *, workspace: Workspace | None = None
) -> Tensor:
    """x @ dequantize(nf4_weight)^T + bias, computed in x.dtype (few tokens on a CPU: products and sums in fp32).

    Args:
        x: [..., K] fp32, bf16 or fp16.
        nf4_weight: [N, K].
        bias: [N] in x.dtype.
        workspace: keeps the scratch (a decode panel of at most 32 MiB, and up to 512 rows in fp32 where products of 16
            bits are computed so) between calls. Without one it is allocated for this call.

    Returns:
        [..., N] in x.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, or x or bias requires a gradient.
    """
    instead = "the NF4 backbone is frozen and runs forward only: call it under torch.no_grad()"
    check_no_gradient("nf4_linear", "x", x, instead)
    check_no_gradient("nf4_linear", "bias", bias, instead)
    rows, cols = nf4_weight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"nf4_linear: expected x of shape [..., {cols}], got {list(x.shape)}")
    nf4 = nf4_weight.tensors
    check_nf4_linear(x, bias, rows, nf4)
    workspace = Workspace() if workspace is None else workspace
    if torch.compiler.is_compiling():
        scratch = workspace.take("nf4_linear", (_any_plan_bytes(x, rows, nf4),), torch.uint8, x.device)
        return _nf4_linear(x, bias, rows, scratch, *nf4)
    plan = _plan(x, rows, nf4)
    scratch = workspace.take("nf4_linear", (plan.scratch_bytes,), torch.uint8, x.device)
    if not runs_eagerly(x, bias, scratch, nf4.packed):
        return _nf4_linear(x, bias, rows, scratch, *nf4)
    return _multiply(x, bias, rows, scratch, nf4, plan)
