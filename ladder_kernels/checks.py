"""Argument checks of the ops, shared by the real and the fake kernels: metadata only, no tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladder_kernels.nf4_tensors import NF4Tensors
from ladder_kernels.reference import ABSMAX_BLOCK, BLOCK_SIZES, IGNORE_INDEX

if TYPE_CHECKING:
    from ladder_kernels.head import HeadWeight

_Expected = tuple[str, Tensor | None, tuple[int | str, ...], torch.dtype]  # name, tensor, shape, dtype
SCRATCH_ALIGNMENT = 64  # bytes; torch's allocators give this much, so only an offset can spoil it
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def names(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes as a person writes them: "float32, bfloat16 or float16"."""
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def check_dtype(op: str, name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype is one of `allowed`."""
    if dtype not in allowed:
        raise TypeError(f"{op}: expected {name} in {names(allowed)}, got {names([dtype])}")


def check_shape(op: str, name: str, tensor: HeadWeight, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless the shape matches; a string in `expected` stands for any size."""
    shape = tensor.shape
    if shape == expected:  # fast where all sizes are known: this runs some 500 times a token
        return
    matches = len(shape) == len(expected)
    for want, got in zip(expected, shape, strict=False):
        matches = matches and (want == got or type(want) is str)
    if not matches:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: expected {name} of shape [{wanted}], got {list(shape)}")


def check_device(op: str, name: str, tensor: HeadWeight, device: torch.device) -> None:
    """Raise ValueError unless the tensor is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{op}: expected {name} on {device}, got {tensor.device}; move it with .to({str(device)!r})")


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: expected contiguous {name}, got strides {tensor.stride()}; call .contiguous()")


def check_like(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless the tensor has that shape, and dtype and device of `like`; one comparison where all is well."""
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, like.dtype, like.device):
        check_shape(op, name, tensor, shape)
        check_dtype(op, name, tensor.dtype, (like.dtype,))
        check_device(op, name, tensor, like.device)


def _check_dense(op: str, expected: Sequence[_Expected], device: torch.device) -> None:
    """Raise unless each tensor that is there has its shape and dtype, is contiguous and on the device."""
    for name, tensor, shape, dtype in expected:
        if tensor is not None:
            check_shape(op, name, tensor, shape)
            check_dtype(op, name, tensor.dtype, (dtype,))
            check_contiguous(op, name, tensor)
            check_device(op, name, tensor, device)


def check_no_gradient(op: str, name: str, tensor: Tensor | None, instead: str) -> None:
    """Raise ValueError if autograd would want a gradient that the op does not have."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires a gradient, but this op has none for it; {instead}")


def check_block_size(op: str, block_size: int) -> None:
    """Raise ValueError unless it is one of BLOCK_SIZES."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(f"{op}: expected a block_size in {list(BLOCK_SIZES)}, got {block_size!r}")


def check_nf4(op: str, nf4: NF4Tensors) -> None:
    """Check that the tensors of an NF4 matrix fit each other: the native kernels read them without looking."""
    packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size = nf4
    check_block_size(op, block_size)
    nested = {"absmax_scale": absmax_scale, "absmax_map": absmax_map, "absmax_offset": absmax_offset}
    missing = [name for name, tensor in nested.items() if tensor is None]
    if 0 < len(missing) < len(nested):
        raise ValueError(f"{op}: expected {' and '.join(nested)}, or none of them, got no {' and no '.join(missing)}")
    check_shape(op, "packed", packed, ("bytes",))
    # Block sizes are even, so an unused last nibble never adds a block.
    blocks = -(-2 * packed.shape[0] // block_size)
    expected: list[_Expected] = [
        ("packed", packed, ("bytes",), torch.uint8),
        ("absmax", absmax, (blocks,), torch.float32 if missing else torch.uint8),
        ("codebook", codebook, (16,), torch.float32),
        ("absmax_scale", absmax_scale, (-(-blocks // ABSMAX_BLOCK),), torch.float32),
        ("absmax_map", absmax_map, (256,), torch.float32),
        ("absmax_offset", absmax_offset, (), torch.float32),
    ]
    _check_dense(op, expected, packed.device)


def check_dequantize(nf4: NF4Tensors, first_row: int, out: Tensor) -> None:
    """Check that rows [first_row, first_row + out.shape[0]) of width out.shape[1] lie in the packed matrix."""
    op = "dequantize_nf4"
    check_dtype(op, "out", out.dtype, COMPUTE_DTYPES)
    check_shape(op, "out", out, ("rows", "K"))
    check_contiguous(op, "out", out)
    check_device(op, "out", out, nf4.packed.device)
    end = (first_row + out.shape[0]) * out.shape[1]
    size, blocks = nf4.packed.numel(), nf4.absmax.numel()
    if first_row < 0 or (end + 1) // 2 > size or -(-end // nf4.block_size) > blocks:
        raise ValueError(
            f"{op}: expected rows inside {size} packed bytes and {blocks} blocks of {nf4.block_size}, "
            f"got rows {first_row} to {first_row + out.shape[0]} of width {out.shape[1]}"
        )


def check_nf4_linear(x: Tensor, bias: Tensor | None, rows: int, nf4: NF4Tensors) -> None:
    """Check x [..., K] and bias [N] against a packed [N, K] matrix."""
    op = "nf4_linear"
    check_dtype(op, "x", x.dtype, COMPUTE_DTYPES)
    check_device(op, "x", x, nf4.packed.device)
    if (rows * x.shape[-1] + 1) // 2 != nf4.packed.numel():
        raise ValueError(
            f"{op}: expected x [..., K] with {rows} * K weights in {nf4.packed.numel()} packed bytes, "
            f"got {list(x.shape)}"
        )
    if bias is not None:
        check_like(op, "bias", bias, (rows,), x)


def check_scratch(op: str, scratch: Tensor, size: int, device: torch.device) -> None:
    """Check that scratch is at least `size` contiguous bytes of uint8 on the device."""
    check_shape(op, "scratch", scratch, ("bytes",))
    check_dtype(op, "scratch", scratch.dtype, (torch.uint8,))
    check_contiguous(op, "scratch", scratch)
    check_device(op, "scratch", scratch, device)
    if scratch.storage_offset() % SCRATCH_ALIGNMENT:
        offset = scratch.storage_offset()
        raise ValueError(f"{op}: expected scratch at a multiple of {SCRATCH_ALIGNMENT} bytes, got offset {offset}")
    if scratch.numel() < size:
        raise ValueError(f"{op}: expected at least {size} bytes of scratch, got {scratch.numel()}")


def check_tap(h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None) -> None:
    """Check h [T, D], weight [S, D], state [T, S] and the 0-dim gate."""
    op = "tap"
    check_shape(op, "h", h, ("T", "D"))
    check_dtype(op, "h", h.dtype, (*COMPUTE_DTYPES, torch.float64))
    check_shape(op, "weight", weight, ("S", h.shape[1]))
    check_dtype(op, "weight", weight.dtype, (*COMPUTE_DTYPES, torch.float64))
    check_device(op, "weight", weight, h.device)
    if state is not None:
        check_like(op, "state", state, (h.shape[0], weight.shape[0]), h)
    if gate is not None:
        if state is None:
            raise ValueError(f"{op}: expected a state beside the gate, got None; pass state, or no gate")
        check_shape(op, "gate", gate, ())
        check_device(op, "gate", gate, h.device)


def check_linear_cross_entropy(hidden: Tensor, head_weight: HeadWeight, targets: Tensor) -> None:
    """Check hidden [R, D], head_weight [V, D], dense or packed, and targets int64 [R]."""
    op = "linear_cross_entropy"
    is_dense = isinstance(head_weight, Tensor)
    check_shape(op, "hidden", hidden, ("R", "D"))
    check_dtype(op, "hidden", hidden.dtype, (*COMPUTE_DTYPES, torch.float64) if is_dense else COMPUTE_DTYPES)
    check_shape(op, "head_weight", head_weight, ("V", hidden.shape[1]))
    if head_weight.shape[0] == 0:
        raise ValueError(f"{op}: expected head_weight [V, D] with V > 0, got {list(head_weight.shape)}")
    if is_dense:
        check_dtype(op, "head_weight", head_weight.dtype, (hidden.dtype,))
    check_device(op, "head_weight", head_weight, hidden.device)
    check_shape(op, "targets", targets, (hidden.shape[0],))
    check_dtype(op, "targets", targets.dtype, (torch.int64,))
    check_device(op, "targets", targets, hidden.device)


def check_logits(
    hidden: Tensor,
    head_weight: HeadWeight,
    logits: Tensor,
    wide_logits: Tensor | None,
    panels: Tensor | None,
    sums: Tensor | None,
    *,
    needs_wide: bool,
) -> None:
    """Check the scratch of `linear_cross_entropy`: logits [chunk, V], fp32 wide_logits [chunk, V] where needed, and of
    a packed head panels [1 or 2, P, D] and, for 16 bits, fp32 sums [chunk, D]."""
    op = "linear_cross_entropy"
    vocabulary, width = head_weight.shape
    check_shape(op, "logits", logits, ("chunk", vocabulary))
    if logits.shape[0] == 0:
        raise ValueError(f"{op}: expected logits [chunk, V] of at least one row, got {list(logits.shape)}")
    if needs_wide and wide_logits is None:
        raise ValueError(f"{op}: expected wide_logits, float32 scratch of shape {list(logits.shape)}, got None")
    if not isinstance(head_weight, Tensor):
        if panels is None or (sums is None and hidden.dtype.itemsize == 2):
            raise ValueError(f"{op}: expected panels and, for 16 bits, sums as scratch of a packed head, got None")
        if panels.dim() == 3 and min(panels.shape) == 0:
            raise ValueError(f"{op}: expected panels [1 or 2, P, D] of at least one row, got {list(panels.shape)}")
    expected: tuple[_Expected, ...] = (
        ("logits", logits, ("chunk", vocabulary), hidden.dtype),
        ("wide_logits", wide_logits, (logits.shape[0], vocabulary), torch.float32),
        ("panels", panels, ("count", "P", width), hidden.dtype),
        ("sums", sums, (logits.shape[0], width), torch.float32),
    )
    _check_dense(op, expected, hidden.device)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless every target is in [0, vocabulary) or IGNORE_INDEX. Reads the tensor."""
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != IGNORE_INDEX)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"linear_cross_entropy: expected targets in [0, {vocabulary}) or {IGNORE_INDEX}, got {int(targets[row])} "
            f"in row {row}; is the tokenizer that of the model?"
        )
