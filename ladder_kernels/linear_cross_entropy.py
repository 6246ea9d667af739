"""Cross entropy of a frozen language-model head, without ever holding all logits.

    loss = sum over rows r with targets[r] != -100 of  logsumexp(l_r) - l_r[targets[r]],   l = hidden @ head_weight^T

hidden [R, D], head_weight [V, D], targets [R]. Rows pass in chunks through one reused buffer, in which the logits
become probabilities and then their gradient, so dhidden [R, D] is finished when the loss is; it is all that is kept
for backward. Softmax is computed in fp32; 16-bit inputs have their logits rounded to 16 bits first, as an
unfused head does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ladder_kernels import native, reference
from ladder_kernels.checks import check_linear_cross_entropy, check_logits, check_no_gradient, check_targets
from ladder_kernels.dispatch import runs_eagerly, uses_triton
from ladder_kernels.launch import logit_chunk_bytes, logit_rows
from ladder_kernels.workspace import Workspace


@torch.library.custom_op(
    "ladder::linear_cross_entropy",
    mutates_args=("logits", "wide_logits"),
    schema="(Tensor hidden, Tensor head_weight, Tensor targets, Tensor(a!) logits, Tensor(b!)? wide_logits,"
    " bool need_grad) -> (Tensor, Tensor)",
)
def _linear_cross_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, logits: Tensor, wide_logits: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    _check(hidden, head_weight, targets, logits, wide_logits)
    if hidden.device.type == "cpu":
        check_targets(targets, head_weight.shape[0])
    return _compute_here(hidden, head_weight, targets, logits, wide_logits, need_grad)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, logits: Tensor, wide_logits: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    _check(hidden, head_weight, targets, logits, wide_logits)
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(hidden) if need_grad else hidden.new_empty(0)


def _check(hidden: Tensor, head_weight: Tensor, targets: Tensor, logits: Tensor, wide_logits: Tensor | None) -> None:
    check_linear_cross_entropy(hidden, head_weight, targets)
    check_logits(hidden, head_weight, logits, wide_logits, needs_wide=_needs_wide_logits(hidden))


def _is_native(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype != torch.float64 and native.available()


def _needs_wide_logits(hidden: Tensor) -> bool:
    """The kernels widen 16-bit logits as they read them; torch needs memory for that."""
    return hidden.dtype.itemsize == 2 and not _is_native(hidden) and not uses_triton(hidden)


def _compute_here(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, logits: Tensor, wide_logits: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, fp32 (fp64 for fp64), and dhidden [R, D] (empty [0] without need_grad)."""
    targets = targets.contiguous()
    losses = hidden.new_zeros(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    dhidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0)
    for begin in range(0, hidden.shape[0], logits.shape[0]):
        rows = slice(begin, begin + logits.shape[0])
        size = hidden[rows].shape[0]
        chunk = torch.mm(hidden[rows], head_weight.T, out=logits[:size])
        wide_chunk = None if wide_logits is None else wide_logits[:size]
        _softmax(chunk, targets[rows], losses[rows], wide_chunk, need_grad)
        if need_grad:
            torch.mm(chunk, head_weight, out=dhidden[rows])
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
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, logits: Tensor, wide_logits: Tensor | None
    ) -> Tensor:
        loss, dhidden = _compute(hidden, head_weight, targets, logits, wide_logits, True)
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * dloss, None, None, None, None


def _compute(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, logits: Tensor, wide_logits: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    op = _compute_here if runs_eagerly(hidden, head_weight, targets) else _linear_cross_entropy
    return op(hidden, head_weight, targets, logits, wide_logits, need_grad)


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    chunk_bytes: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Sum of the cross entropies of the rows under a frozen head; the gradient to hidden comes from the same pass.

    Args:
        hidden: [R, D] fp32, bf16, fp16 (or fp64), the supervised rows only, after the final norm.
        head_weight: [V, D] in hidden.dtype, frozen.
        targets: int64 [R]; -100 pads a bucket and contributes nothing.
        chunk_bytes: budget of the logits buffer, counted in at least fp32; `launch.logit_chunk_bytes` by default.
        workspace: keeps that buffer between calls. Without one it is allocated for this call.

    Returns:
        The sum, 0-dim, in fp32 (fp64 for fp64 inputs); 0 for R = 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, head_weight requires a gradient, chunk_bytes is not
            positive, or a target is neither -100 nor in [0, V). On a GPU nobody waits to find out: the loss is NaN.
    """
    op = "linear_cross_entropy"
    check_linear_cross_entropy(hidden, head_weight, targets)
    check_no_gradient(op, "head_weight", head_weight, "the head is frozen: call head_weight.requires_grad_(False)")
    if chunk_bytes is None:
        chunk_bytes = logit_chunk_bytes(hidden.device.type)
    if chunk_bytes <= 0:
        raise ValueError(f"{op}: expected positive chunk_bytes, got {chunk_bytes}")
    if targets.device.type == "cpu" and runs_eagerly(targets):
        check_targets(targets, head_weight.shape[0])
    vocabulary = head_weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shape = (logit_rows(hidden.shape[0], vocabulary, wide.itemsize, chunk_bytes), vocabulary)
    workspace = Workspace() if workspace is None else workspace
    logits = workspace.take("logits", shape, hidden.dtype, hidden.device)
    needs_wide = _needs_wide_logits(hidden)
    wide_logits = workspace.take("wide_logits", shape, wide, hidden.device) if needs_wide else None
    if hidden.requires_grad and torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, head_weight, targets, logits, wide_logits)
    with torch.no_grad():
        return _compute(hidden, head_weight, targets, logits, wide_logits, False)[0]
