"""A tap: project a backbone hidden state to the side network's width and merge it into the side state.

    z = h @ weight^T                              h [T, D], weight [S, D] -> z [T, S]
    out = z                                       without a state
        = state + z                               without a gate
        = gate * state + (1 - gate) * z           with a gate

Kept for backward: h, weight, and the state only where the gate needs a gradient. z is never kept: its one use, the sum
over dout * z in the gradient of the gate, equals the sum over (dout^T h) * weight, and dout^T h is computed anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels import reference
from ladder_kernels.checks import check_no_gradient, check_tap
from ladder_kernels.dispatch import runs_eagerly, without_autocast


@torch.library.custom_op(
    "ladder::tap", mutates_args=(), schema="(Tensor h, Tensor weight, Tensor? state, Tensor? gate) -> Tensor"
)
def _tap(h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None) -> Tensor:
    check_tap(h, weight, state, gate)
    with without_autocast(h.device):
        return reference.tap(h, weight, state, gate)


@_tap.register_fake
def _(h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None) -> Tensor:
    check_tap(h, weight, state, gate)
    return h.new_empty(h.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    h, weight, state, gate = inputs
    needs_state = gate is not None and gate.requires_grad
    ctx.save_for_backward(h, weight, state if needs_state else None, gate)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(dout.device):
        return _gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, state, gate = ctx.saved_tensors
    _, needs_weight, needs_state, needs_gate = ctx.needs_input_grad
    dweight = dstate = dgate = None
    if needs_weight or needs_gate:
        dweight = reference.tap_weight_gradient(dout, h, weight.dtype)
    if needs_gate:
        wide = torch.promote_types(dout.dtype, torch.float32)
        mixed = (dout.to(wide) * state).sum() - (dweight.to(wide) * weight.to(h.dtype)).sum()
        dgate = mixed.to(gate.dtype)
    if needs_weight and gate is not None:
        dweight = dweight * (1 - gate)
    if needs_state:
        dstate = dout if gate is None else dout * gate
    return None, dweight if needs_weight else None, dstate, dgate


_tap.register_autograd(_backward, setup_context=_setup_context)


def tap(h: Tensor, weight: Tensor, state: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """Project h to the side width and merge it into the side state; differentiable in weight, state and gate.

    Args:
        h: [T, D], a hidden state of the frozen backbone; no gradient.
        weight: [S, D]. May be wider than h (fp32 beside bf16): the product is in h.dtype, its gradient in weight.dtype.
        state: [T, S] in h.dtype, or None where the side network starts.
        gate: 0-dim, in (0, 1), or None to add.

    Returns:
        [T, S] in h.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, h requires a gradient, or there is a gate
            but no state.
    """
    check_no_gradient("tap", "h", h, "hidden states come from the frozen backbone: detach it")
    trainable = (weight, state, gate)
    if runs_eagerly(h, *trainable) and not (torch.is_grad_enabled() and any(_requires_grad(t) for t in trainable)):
        check_tap(h, weight, state, gate)
        with without_autocast(h.device):
            return reference.tap(h, weight, state, gate)
    return _tap(h, weight, state, gate)


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
