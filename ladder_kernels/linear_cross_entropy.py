"""Cross entropy of a frozen language-model head, without ever holding all logits.

    loss = sum over rows r with targets[r] != -100 of  logsumexp(l_r) - l_r[targets[r]],   l = hidden @ head_weight^T

hidden [R, D], head_weight [V, D], targets [R]. Rows pass in chunks through one reused buffer, in which the logits
become probabilities and then their gradient, so dhidden [R, D] is finished when the loss is; it is all that is kept
for backward. Softmax is computed in fp32; 16-bit inputs have their logits rounded to 16 bits first, as an
unfused head does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ladder_kernels import native, reference
from ladder_kernels.checks import check_linear_cross_entropy, check_logits, check_no_gradient, check_targets
from ladder_kernels.dispatch import runs_eagerly, uses_triton
from ladder_kernels.head import HeadWeight, head_from_tensors, head_panels, head_tensors, logits_dx_into, logits_into
from ladder_kernels.launch import logit_chunk_bytes, logit_rows
from ladder_kernels.workspace import Workspace


class _Scratch(NamedTuple):
    """Memory that is written to: logits [chunk, V] in the dtype of hidden, wide_logits as fp32 where torch computes
    their softmax, and for a packed head panels [1 or 2, P, D] and for 16 bits sums fp32 [chunk, D]."""

    logits: Tensor
    wide_logits: Tensor | None
    panels: Tensor | None
    sums: Tensor | None


@torch.library.custom_op(
    "ladder::linear_cross_entropy",
    mutates_args=("logits", "wide_logits", "panels", "sums"),
    schema="(Tensor hidden, Tensor[] head, int block_size, Tensor targets, Tensor(a!) logits, Tensor(b!)? wide_logits,"
    " Tensor(c!)? panels, Tensor(d!)? sums, bool need_grad) -> (Tensor, Tensor)",
)
def _linear_cross_entropy(
    hidden: Tensor, head: list[Tensor], block_size: int, targets: Tensor, *scratch_and_need_grad: Any
) -> tuple[Tensor, Tensor]:
    *tensors, need_grad = scratch_and_need_grad
    scratch = _Scratch(*tensors)
    weight = _checked_head(hidden, head, block_size, targets, scratch)
    if hidden.device.type == "cpu":
        check_targets(targets, weight.shape[0])
    return _compute_here(hidden, weight, targets, scratch, need_grad)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, head: list[Tensor], block_size: int, targets: Tensor, *scratch_and_need_grad: Any
) -> tuple[Tensor, Tensor]:
    *tensors, need_grad = scratch_and_need_grad
    _checked_head(hidden, head, block_size, targets, _Scratch(*tensors))
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(hidden) if need_grad else hidden.new_empty(0)


def _checked_head(
    hidden: Tensor, head: list[Tensor], block_size: int, targets: Tensor, scratch: _Scratch
) -> HeadWeight:
    shape = (scratch.logits.shape[-1], hidden.shape[-1])
    weight = head_from_tensors(head, block_size, shape, hidden.dtype)
    check_linear_cross_entropy(hidden, weight, targets)
    check_logits(hidden, weight, *scratch, needs_wide=_needs_wide_logits(hidden))
    return weight


def _is_native(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype != torch.float64 and native.available()


def _needs_wide_logits(hidden: Tensor) -> bool:
    """The kernels widen 16-bit logits as they read them; torch needs memory for that."""
    return hidden.dtype.itemsize == 2 and not _is_native(hidden) and not uses_triton(hidden)


def _compute_here(
    hidden: Tensor, weight: HeadWeight, targets: Tensor, scratch: _Scratch, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, fp32 (fp64 for fp64), and dhidden [R, D] (empty [0] without need_grad)."""
    logits, wide_logits, panels, sums = scratch
    targets = targets.contiguous()
    losses = hidden.new_zeros(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    dhidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0)
    for begin in range(0, hidden.shape[0], logits.shape[0]):
        rows = slice(begin, begin + logits.shape[0])
        size = hidden[rows].shape[0]
        chunk = logits_into(logits[:size], hidden[rows], weight, panels)
        wide_chunk = None if wide_logits is None else wide_logits[:size]
        _softmax(chunk, targets[rows], losses[rows], wide_chunk, need_grad)
        if need_grad:
            logits_dx_into(dhidden[rows], chunk, weight, panels, sums)
    return losses.sum(), dhidden


def _softmax(chunk: Tensor, targets: Tensor, losses: Tensor, wide_chunk: Tensor | None, need_grad: bool) -> None:
    """Write the losses of a chunk of logits, and with need_grad their gradient over the logits."""
    if uses_triton(chunk):
        from ladder_kernels.gpu.cross_entropy import cross_entropy

        cross_entropy(chunk, targets, losses, need_grad)
    elif _is_native(chunk):
        losses.copy_(native.cross_entropy(chunk, targets, need_grad))
    else:
        losses.copy_(reference.cross_entropy(chunk, targets, wide_chunk, need_grad))


class _LinearCrossEntropy(torch.autograd.Function):
    """Autograd around the op. (`register_autograd` refuses ops that write to an argument, here the scratch.)"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: HeadWeight, targets: Tensor, scratch: _Scratch) -> Tensor:
        loss, dhidden = _compute(hidden, weight, targets, scratch, True)
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * dloss, None, None, None


def _compute(
    hidden: Tensor, weight: HeadWeight, targets: Tensor, scratch: _Scratch, need_grad: bool
) -> tuple[Tensor, Tensor]:
    head, block_size = head_tensors(weight)
    if runs_eagerly(hidden, *head, targets):
        return _compute_here(hidden, weight, targets, scratch, need_grad)
    return _linear_cross_entropy(hidden, head, block_size, targets, *scratch, need_grad)


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: HeadWeight,
    targets: Tensor,
    *,
    chunk_bytes: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Sum of the cross entropies of the rows under a frozen head; the gradient to hidden comes from the same pass.

    Args:
        hidden: [R, D] fp32, bf16, fp16 (or fp64), the supervised rows only, after the final norm.
        head_weight: [V, D], frozen: dense in hidden.dtype, or packed as int8 or NF4 (not with fp64), which is decoded
            panel by panel for every chunk, twice.
        targets: int64 [R]; -100 pads a bucket and contributes nothing.
        chunk_bytes: budget of the logits buffer, counted in at least fp32; `launch.logit_chunk_bytes` by default.
        workspace: keeps that buffer and the panels between calls. Without one they are allocated for this call.

    Returns:
        The sum, 0-dim, in fp32 (fp64 for fp64 inputs); 0 for R = 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, head_weight requires a gradient, chunk_bytes is not
            positive, or a target is neither -100 nor in [0, V). On a GPU nobody waits to find out: the loss is NaN.
    """
    op = "linear_cross_entropy"
    check_linear_cross_entropy(hidden, head_weight, targets)
    if isinstance(head_weight, Tensor):
        check_no_gradient(op, "head_weight", head_weight, "the head is frozen: call head_weight.requires_grad_(False)")
    if chunk_bytes is None:
        chunk_bytes = logit_chunk_bytes(hidden.device.type)
    if chunk_bytes <= 0:
        raise ValueError(f"{op}: expected positive chunk_bytes, got {chunk_bytes}")
    if targets.device.type == "cpu" and runs_eagerly(targets):
        check_targets(targets, head_weight.shape[0])
    vocabulary, width = head_weight.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    chunk = logit_rows(hidden.shape[0], vocabulary, wide.itemsize, chunk_bytes)
    workspace = Workspace() if workspace is None else workspace
    device, needs_wide = hidden.device, _needs_wide_logits(hidden)
    panels = head_panels(hidden, chunk, head_weight, workspace)
    scratch = _Scratch(
        workspace.take("logits", (chunk, vocabulary), hidden.dtype, device),
        workspace.take("wide_logits", (chunk, vocabulary), wide, device) if needs_wide else None,
        panels,
        None if panels is None or wide == hidden.dtype else workspace.take("head_sums", (chunk, width), wide, device),
    )
    if hidden.requires_grad and torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, head_weight, targets, scratch)
    with torch.no_grad():
        return _compute(hidden, head_weight, targets, scratch, False)[0]
