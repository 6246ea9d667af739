"""x W^T of an NF4 weight, with its epilogues, by the fused kernel or by decoded panels: whichever the plan says."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ladder_kernels.gpu.nf4_gemm import nf4_gemm
from ladder_kernels.gpu.spec import architecture
from ladder_kernels.launch import GpuLinearPlan, gpu_linear_plan
from ladder_kernels.nf4 import dequantize_rows
from ladder_kernels.nf4_tensors import NF4Tensors
from ladder_kernels.panels import panel_linear


@functools.cache
def card(device: torch.device) -> tuple[int, int]:
    """Architecture and number of multiprocessors."""
    return architecture(device), torch.cuda.get_device_properties(device).multi_processor_count


def linear_plan_for(
    x: Tensor, rows: int, nf4: NF4Tensors, *, is_pair: bool = False, half_precision: bool = False
) -> GpuLinearPlan:
    """The plan for CUDA x [..., K] and a weight [rows, K] on its card."""
    cols = x.shape[-1]
    tokens = x.numel() // cols if cols else 0
    size = (tokens, rows, cols, nf4.block_size, x.dtype.itemsize, *card(x.device))
    return gpu_linear_plan(*size, is_pair=is_pair, half_precision=half_precision and x.dtype == torch.float16)


def nf4_linear(
    x: Tensor,
    nf4: NF4Tensors,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: GpuLinearPlan,
    scratch: Tensor,
    out: Tensor,
    *,
    half_precision: bool = False,
) -> None:
    """Write x [M, K] @ W^T + bias [N], plus residual [M, N], to out [M, N]; x contiguous, scratch uint8."""
    if plan.config is not None:
        half_precision = half_precision and x.dtype == torch.float16
        nf4_gemm(x, nf4, None, bias, residual, plan, scratch, out, half_precision=half_precision)
        return
    count = min(2, -(-out.shape[1] // plan.panel_rows))
    panels = scratch[: plan.scratch_bytes].view(x.dtype).view(count, plan.panel_rows, x.shape[1])
    panel_linear(x, functools.partial(dequantize_rows, nf4), bias, panels, out)
    if residual is not None:
        out.add_(residual)


def nf4_swiglu(
    x: Tensor,
    gate: NF4Tensors,
    up: NF4Tensors,
    plan: GpuLinearPlan,
    scratch: Tensor,
    out: Tensor,
    *,
    half_precision: bool = False,
) -> None:
    """Write silu(x W_gate^T) * (x W_up^T) to out [M, N] by the fused kernel, which the plan has to be for."""
    half_precision = half_precision and x.dtype == torch.float16
    nf4_gemm(x, gate, up, None, None, plan, scratch, out, half_precision=half_precision)
