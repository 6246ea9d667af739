"""int8 with one scale per row: a frozen head of half the size at no visible cost.

    w[r, c] = code[r, c] * scale[r],   scale[r] = max_c |w[r, c]| / 127        in fp32, rounded once to the wanted dtype

A weight is off by at most half a step, max_c |w[r, c]| / 254, and the rounding to its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ladder_kernels.checks import COMPUTE_DTYPES, check_contiguous, check_device, check_dtype, check_shape

_CHUNK = 1 << 22  # weights encoded at a time: an fp32 copy of a whole head would be larger than the head
_SMALLEST_ABSMAX = 1e-36  # below it 127 / absmax is no fp32 number: such a row is kept as zeros


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """An [N, K] matrix in int8.

    Attributes:
        codes: int8 [N, K], -127 to 127.
        scales: fp32 [N].
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_shape("Int8Weight", "codes", self.codes, ("N", "K"))
        check_dtype("Int8Weight", "codes", self.codes.dtype, (torch.int8,))
        check_shape("Int8Weight", "scales", self.scales, (self.codes.shape[0],))
        check_dtype("Int8Weight", "scales", self.scales.dtype, (torch.float32,))
        check_device("Int8Weight", "scales", self.scales, self.codes.device)
        for name in ("codes", "scales"):
            check_contiguous("Int8Weight", name, getattr(self, name))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.scales.nbytes

    def map(self, fn: Callable[[Tensor], Tensor]) -> Int8Weight:
        """The same matrix with `fn` applied to both tensors."""
        return Int8Weight(fn(self.codes), fn(self.scales))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Int8Weight:
        """The same matrix on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Quantize a matrix to int8: code = round(127 * w / absmax of its row). A row of zeros decodes to zeros.

    Args:
        weight: [N, K] fp32, bf16 or fp16, finite.

    Raises:
        ValueError, TypeError: not a matrix, empty, not finite, or not one of these dtypes.
    """
    check_shape("quantize_int8", "weight", weight, ("N", "K"))
    check_dtype("quantize_int8", "weight", weight.dtype, COMPUTE_DTYPES)
    rows, cols = weight.shape
    if weight.numel() == 0:
        raise ValueError(f"quantize_int8: expected a matrix with weights in it, got shape {list(weight.shape)}")
    codes = torch.empty(rows, cols, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // cols)
    for begin in range(0, rows, step):
        part = weight.detach()[begin : begin + step].float()
        absmax = part.abs().amax(dim=1)
        if not bool(absmax.isfinite().all()):
            raise ValueError(f"quantize_int8: expected finite weights, got NaN or infinity in rows {begin} and after")
        # A number over a tensor would be the number times a rounded reciprocal.
        inverse = torch.where(absmax > _SMALLEST_ABSMAX, torch.full_like(absmax, 127.0) / absmax, 0.0)
        codes[begin : begin + step] = (part * inverse[:, None]).round_()
        scales[begin : begin + step] = absmax * (1 / 127)
    return Int8Weight(codes, scales)


def dequantize_int8_rows(weight: Int8Weight, first_row: int, out: Tensor) -> None:
    """Decode rows [first_row, first_row + P) into out [P, K]. Nothing is checked."""
    rows = slice(first_row, first_row + out.shape[0])
    torch.mul(weight.codes[rows], weight.scales[rows, None], out=out)
