"""Products with the frozen head W [V, D], whatever it is kept as: dense, int8 (half of 16 bits) or NF4 (a quarter).

    logits = x W^T          dx = dlogits W

A packed head is decoded panel by panel into reused memory, forward as well as backward: it never exists as a whole.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels.checks import COMPUTE_DTYPES, check_device, check_dtype, check_no_gradient, check_shape
from ladder_kernels.dispatch import uses_triton
from ladder_kernels.int8 import Int8Weight, dequantize_int8_rows
from ladder_kernels.launch import gpu_panel_rows, panel_rows
from ladder_kernels.nf4 import NF4Weight, dequantize_rows
from ladder_kernels.nf4_linear import nf4_linear
from ladder_kernels.panels import Decode, panel_linear, panel_linear_dx
from ladder_kernels.workspace import Workspace

HeadWeight = Tensor | Int8Weight | NF4Weight


def head_tensors(weight: HeadWeight) -> tuple[list[Tensor], int]:
    """What an op's schema can hold of a head: its tensors and the NF4 block size, 0 for the others."""
    if isinstance(weight, Tensor):
        return [weight], 0
    if isinstance(weight, Int8Weight):
        return [weight.codes, weight.scales], 0
    *tensors, block_size = weight.tensors
    return [tensor for tensor in tensors if tensor is not None], block_size


def head_from_tensors(tensors: list[Tensor], block_size: int, shape: tuple[int, int], dtype: torch.dtype) -> HeadWeight:
    """The inverse of `head_tensors`.

    Raises:
        ValueError, TypeError: the tensors do not form a matrix of that shape.
    """
    if len(tensors) == 1:
        return tensors[0]
    if len(tensors) == 2:
        return Int8Weight(*tensors)
    if len(tensors) not in (3, 6):
        raise ValueError(f"head: expected 1 tensor (dense), 2 (int8), 3 or 6 (NF4), got {len(tensors)}")
    packed, absmax, codebook, *nested = tensors
    return NF4Weight(packed, absmax, codebook, shape, dtype, block_size, *nested)


def decode_head(weight: HeadWeight, dtype: torch.dtype) -> Tensor:
    """The whole matrix [V, D] in `dtype`: the head itself where it is dense, else new memory."""
    if isinstance(weight, Tensor):
        return weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _decode(weight)(0, out)
    return out


def head_panels(x: Tensor, rows: int, weight: HeadWeight, workspace: Workspace) -> Tensor | None:
    """Scratch [1 or 2, P, D] in x.dtype for products of up to `rows` rows with a packed head; None for a dense one."""
    if isinstance(weight, Tensor):
        return None
    size = (rows, *weight.shape, x.element_size())
    if uses_triton(x):
        from ladder_kernels.gpu.nf4_linear import card

        step = gpu_panel_rows(*size, *card(x.device))
    else:
        step = panel_rows(*size)
    count = min(2, -(-weight.shape[0] // step)) if x.is_cuda else 1
    return workspace.take("head_panels", (count, step, weight.shape[1]), x.dtype, x.device)


def logits_into(out: Tensor, x: Tensor, weight: HeadWeight, panels: Tensor | None) -> Tensor:
    """Write x [R, D] W^T to out [R, V], which is returned. Nothing is checked."""
    if isinstance(weight, Tensor):
        return torch.mm(x, weight.T, out=out)
    assert panels is not None
    panel_linear(x, _decode(weight), None, panels, out)
    return out


def logits_dx_into(
    out: Tensor, dlogits: Tensor, weight: HeadWeight, panels: Tensor | None, sums: Tensor | None
) -> None:
    """Write dlogits [R, V] W to out [R, D]. Nothing is checked.

    Args:
        sums: fp32 scratch [at least R, D] for a packed head and 16-bit logits.
    """
    if isinstance(weight, Tensor):
        torch.mm(dlogits, weight, out=out)
        return
    assert panels is not None
    panel_linear_dx(dlogits, _decode(weight), panels, out if sums is None else sums[: out.shape[0]], out)


def head_logits(x: Tensor, weight: HeadWeight, *, workspace: Workspace | None = None) -> Tensor:
    """x W^T; of a packed head without gradients.

    Args:
        x: [..., D] fp32, bf16 or fp16 (with a dense head also fp64).
        weight: [V, D], dense in x.dtype, int8 or NF4.
        workspace: keeps decode panels between calls.

    Returns:
        [..., V] in x.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, or x requires a gradient that a packed head has not.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    workspace = Workspace() if workspace is None else workspace
    if isinstance(weight, NF4Weight):
        return nf4_linear(x, weight, workspace=workspace)
    instead = "call it under torch.no_grad(), or linear_cross_entropy for a loss"
    check_no_gradient("head_logits", "x", x, instead)
    check_dtype("head_logits", "x", x.dtype, COMPUTE_DTYPES)
    check_device("head_logits", "x", x, weight.device)
    rows = x.reshape(-1, x.shape[-1])
    check_shape("head_logits", "x", rows, ("...", weight.shape[1]))
    out = x.new_empty(rows.shape[0], weight.shape[0])
    logits_into(out, rows, weight, head_panels(x, rows.shape[0], weight, workspace))
    return out.view(*x.shape[:-1], weight.shape[0])


def _decode(weight: Int8Weight | NF4Weight) -> Decode:
    if isinstance(weight, Int8Weight):
        return partial(dequantize_int8_rows, weight)
    return partial(dequantize_rows, weight.tensors)
