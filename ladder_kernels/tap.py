"""A tap: project a backbone hidden state to the side network's width and merge it into the side state.

    z = h @ weight^T                              h [T, D], weight [S, D] -> z [T, S]
    out = z                                       without a state
        = state + z                               without a gate
        = gate * state + (1 - gate) * z           with a gate

Kept for backward: h or an int8 copy of it, weight, and the state only where the gate needs a gradient. z is never kept:
its one use, the sum over dout * z in the gradient of the gate, equals the sum over (dout^T h) * weight, and dout^T h is
computed anyway. (From an int8 copy that is the z of the decoded copy.)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ladder_kernels import reference
from ladder_kernels.checks import check_no_gradient, check_tap
from ladder_kernels.dispatch import runs_eagerly, uses_triton_products, without_autocast
from ladder_kernels.reference import INT8_GROUP

_Kept = tuple[Tensor, Tensor | None, Tensor | None]


@torch.library.custom_op(
    "ladder::tap",
    mutates_args=(),
    schema="(Tensor h, Tensor weight, Tensor? state, Tensor? gate, bool keep_int8) -> (Tensor, Tensor, Tensor)",
)
def _tap(
    h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None, keep_int8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The merged state; with keep_int8 also the codes and scales of `reference.encode_hidden`, else two empty ones."""
    check_tap(h, weight, state, gate)
    out, codes, scales = _compute_here(h, weight, state, gate, keep_int8)
    if codes is None or scales is None:
        return out, h.new_empty(0, dtype=torch.int8), h.new_empty(0, dtype=torch.float32)
    return out, codes, scales


@_tap.register_fake
def _(
    h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None, keep_int8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_tap(h, weight, state, gate)
    tokens, width = h.shape
    shapes = ((tokens, width), (tokens, -(-width // INT8_GROUP))) if keep_int8 else ((0,), (0,))
    codes, scales = h.new_empty(shapes[0], dtype=torch.int8), h.new_empty(shapes[1], dtype=torch.float32)
    return h.new_empty(tokens, weight.shape[0]), codes, scales


def _compute_here(h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None, keep_int8: bool) -> _Kept:
    if h.numel() > 0 and weight.numel() > 0 and uses_triton_products(h, weight):
        from ladder_kernels.gpu import tap as gpu

        return gpu.tap(h, weight, state, gate, keep_int8)
    with without_autocast(h.device):
        out = reference.tap(h, weight, state, gate)
        return out, *(reference.encode_hidden(h) if keep_int8 else (None, None))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, weight, state, gate, keep_int8 = inputs
    _, codes, scales = output
    ctx.mark_non_differentiable(codes, scales)
    needs_state = gate is not None and gate.requires_grad
    kept, scales = (codes, scales) if keep_int8 else (h, None)
    ctx.save_for_backward(kept, scales, weight, state if needs_state else None, gate)


def _backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    kept, scales, weight, state, gate = ctx.saved_tensors
    _, *needs, _ = ctx.needs_input_grad
    is_empty = 0 in (dout.numel(), weight.numel())
    # Under create_graph, and where somebody traces this, it has to be made of torch's own ops.
    if (
        not is_empty
        and uses_triton_products(dout, weight)
        and not torch.is_grad_enabled()
        and runs_eagerly(dout, kept, weight)
    ):
        from ladder_kernels.gpu import tap as gpu

        return None, *gpu.tap_gradients(dout, kept, scales, weight, state, gate, needs), None
    with without_autocast(dout.device):
        return None, *_gradients(dout, kept, scales, weight, state, gate, needs), None


def _gradients(
    dout: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    weight: Tensor,
    state: Tensor | None,
    gate: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_weight, needs_state, needs_gate = needs
    dweight = dstate = dgate = None
    if needs_weight or needs_gate:
        dweight = reference.tap_weight_gradient(dout, kept, scales, weight.dtype)
    if needs_gate:
        wide = torch.promote_types(dout.dtype, torch.float32)
        mixed = (dout.to(wide) * state).sum() - (dweight.to(wide) * weight.to(dout.dtype)).sum()
        dgate = mixed.to(gate.dtype)
    if needs_weight and gate is not None:
        dweight = dweight * (1 - gate)
    if needs_state:
        dstate = dout if gate is None else dout * gate
    return dweight if needs_weight else None, dstate, dgate


_tap.register_autograd(_backward, setup_context=_setup_context)


def tap(
    h: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    keep: Literal["input", "int8"] = "input",
) -> Tensor:
    """Project h to the side width and merge it into the side state; differentiable in weight, state and gate.

    Args:
        h: [T, D], a hidden state of the frozen backbone; no gradient.
        weight: [S, D]. May be wider than h (fp32 beside bf16): the product is in h.dtype, its gradient in weight.dtype.
        state: [T, S] in h.dtype, or None where the side network starts.
        gate: 0-dim, in (0, 1), or None to add.
        keep: what backward reads where something needs a gradient: h itself, or a copy in 8 bits, for 16-bit h 0.53
            times its size. The copy is off by at most absmax / 254 and one rounding to h.dtype, absmax over each group
            of 64 columns of a row; that error is in the gradients of weight and gate, never in the result.

    Returns:
        [T, S] in h.dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, h requires a gradient, there is a gate but no state,
            or keep is neither.
    """
    check_no_gradient("tap", "h", h, "hidden states come from the frozen backbone: detach it")
    if keep not in ("input", "int8"):
        raise ValueError(f"tap: expected keep 'input' or 'int8', got {keep!r}")
    trainable = (weight, state, gate)
    needs_grad = torch.is_grad_enabled() and any(_requires_grad(t) for t in trainable)
    if not needs_grad and runs_eagerly(h, *trainable):
        check_tap(h, weight, state, gate)
        return _compute_here(h, weight, state, gate, False)[0]
    # Without a gradient for weight or gate nobody reads what is kept.
    keeps = torch.is_grad_enabled() and (_requires_grad(weight) or _requires_grad(gate))
    return _tap(h, weight, state, gate, keep == "int8" and keeps)[0]


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
