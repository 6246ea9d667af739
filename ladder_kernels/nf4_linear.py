"""out = x @ dequantize(W)^T + bias for a frozen NF4 weight.

x [..., K], W NF4 [N, K], bias [N] -> out [..., N], all in x.dtype. W is decoded panel by panel along N into reused
scratch and each panel is multiplied straight into its columns of out: the whole matrix never exists. Forward only: the
backbone runs without gradients, so there is nothing to save.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ladder_kernels.checks import check_nf4, check_nf4_linear, check_no_gradient
from ladder_kernels.dispatch import runs_eagerly
from ladder_kernels.launch import panel_rows
from ladder_kernels.nf4 import NF4Weight, dequantize_rows
from ladder_kernels.workspace import Workspace


def _multiply_panels(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    absmax_scale: Tensor | None,
    absmax_map: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    rows: int,
    panel: Tensor,
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(flat.shape[0], rows)
    for begin in range(0, rows, panel.shape[0]):
        end = min(begin + panel.shape[0], rows)
        part = panel[: end - begin]
        dequantize_rows(packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size, begin, part)
        if bias is None:
            torch.mm(flat, part.T, out=out[:, begin:end])
        else:
            torch.addmm(bias[begin:end], flat, part.T, out=out[:, begin:end])
    return out.view(*x.shape[:-1], rows)


@torch.library.custom_op(
    "ladder::nf4_linear",
    mutates_args=("panel",),
    schema="(Tensor x, Tensor packed, Tensor absmax, Tensor codebook, Tensor? absmax_scale, Tensor? absmax_map,"
    " Tensor? absmax_offset, Tensor? bias, int block_size, int rows, Tensor(a!) panel) -> Tensor",
)
def _nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    absmax_scale: Tensor | None,
    absmax_map: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    rows: int,
    panel: Tensor,
) -> Tensor:
    check_nf4("nf4_linear", packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size)
    check_nf4_linear(x, packed, bias, rows, panel)
    return _multiply_panels(
        x, packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, bias, block_size, rows, panel
    )


@_nf4_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    absmax_scale: Tensor | None,
    absmax_map: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    rows: int,
    panel: Tensor,
) -> Tensor:
    check_nf4("nf4_linear", packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size)
    check_nf4_linear(x, packed, bias, rows, panel)
    return x.new_empty(*x.shape[:-1], rows)


def nf4_linear(
    x: Tensor, nf4_weight: NF4Weight, bias: Tensor | None = None, *, workspace: Workspace | None = None
) -> Tensor:
    """x @ dequantize(nf4_weight)^T + bias, computed in x.dtype.

    Args:
        x: [..., K] fp32, bf16 or fp16.
        nf4_weight: [N, K].
        bias: [N] in x.dtype.
        workspace: keeps the decode panel (at most 32 MiB) between calls. Without one it is allocated for this call.

    Returns:
        [..., N] in x.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, or x requires a gradient.
    """
    instead = "the NF4 backbone is frozen and runs forward only: call it under torch.no_grad()"
    check_no_gradient("nf4_linear", "x", x, instead)
    rows, cols = nf4_weight.shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise ValueError(f"nf4_linear: expected x of shape [..., {cols}], got {list(x.shape)}")
    size = (panel_rows(math.prod(x.shape[:-1]), rows, cols, x.dtype.itemsize), cols)
    panel = (Workspace() if workspace is None else workspace).take("nf4_panel", size, x.dtype, x.device)
    arguments = (x, *nf4_weight.op_arguments(), bias, nf4_weight.block_size, rows, panel)
    with torch.no_grad():
        if not runs_eagerly(x, bias, panel, *nf4_weight.op_arguments()):
            return _nf4_linear(*arguments)
        check_nf4_linear(x, nf4_weight.packed, bias, rows, panel)
        return _multiply_panels(*arguments)
