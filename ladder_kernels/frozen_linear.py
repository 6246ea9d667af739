"""An NF4 linear that gradients pass through on their way down, without any of its own.

    out = x @ W^T + b                       `nf4_linear`, the same bits
    dx  = dout @ W                          W decoded once more, then a dense product

Nothing is kept for backward: W is frozen, so dx needs neither x nor out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels.dispatch import without_autocast
from ladder_kernels.nf4 import NF4Weight, dequantize_nf4
from ladder_kernels.nf4_linear import nf4_linear
from ladder_kernels.workspace import Workspace


def frozen_linear(
    x: Tensor, nf4_weight: NF4Weight, bias: Tensor | None = None, *, workspace: Workspace | None = None
) -> Tensor:
    """x @ dequantize(nf4_weight)^T + bias as `nf4_linear` computes it, differentiable once, in x alone.

    Backward holds one decoded matrix [N, K] in x.dtype while it multiplies: one product, where panels of W would add up
    in an fp32 [T, K].

    Args:
        x: [..., K] fp32, bf16 or fp16.
        nf4_weight: [N, K].
        bias: [N] in x.dtype, without gradient.
        workspace: see `nf4_linear`.

    Returns:
        [..., N] in x.dtype.

    Raises:
        ValueError, TypeError: as `nf4_linear`, or bias requires a gradient.
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("frozen_linear: bias requires a gradient, but a frozen linear has none for it; detach it")
    return _FrozenLinear.apply(x, nf4_weight, bias, workspace)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, nf4_weight: NF4Weight, bias: Tensor | None, workspace: Workspace | None) -> Tensor:
        ctx.nf4_weight = nf4_weight
        return nf4_linear(x, nf4_weight, bias, workspace=workspace)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        with without_autocast(dout.device):
            return dout @ dequantize_nf4(ctx.nf4_weight, dout.dtype), None, None, None
