"""NF4, the format of the frozen backbone: 4-bit codes in blocks with one scale each, as bitsandbytes to the bit.

    w[e] = codebook[code[e]] * absmax[e // block_size]          in fp32, rounded once to the wanted dtype

Element e of the flattened matrix has its code in packed[e // 2], the high nibble if e is even. With double quantization
the scales are stored in 8 bits, in blocks of 256, and absmax = absmax_map[code] * absmax_scale + absmax_offset, product
and sum rounded separately. 4.127 bits per weight in blocks of 64, 4.5 without double quantization.

Source: QLoRA, arXiv 2305.14314; the exact rounding is that of bitsandbytes 0.50.2 on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ladder_kernels import native, reference
from ladder_kernels.checks import (
    COMPUTE_DTYPES,
    check_block_size,
    check_dequantize,
    check_dtype,
    check_nf4,
    check_no_gradient,
    check_shape,
)
from ladder_kernels.dispatch import runs_eagerly, uses_triton
from ladder_kernels.nf4_tensors import NF4_SCHEMA, NF4Tensors

# Quantiles of the standard normal distribution, scaled to [-1, 1], with an exact zero.
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """An [N, K] matrix in NF4.

    Attributes:
        packed: uint8 [ceil(N*K/2)], two codes a byte; an odd count leaves the last low nibble unused.
        absmax: fp32 [blocks], or uint8 [blocks] codes with double quantization; blocks = ceil(N*K/block_size).
        codebook: fp32 [16].
        shape: (N, K).
        dtype: that of the matrix before quantization.
        block_size: weights per scale, one of `reference.BLOCK_SIZES`.
        absmax_scale: fp32 [ceil(blocks/256)], with double quantization only, as the next two.
        absmax_map: fp32 [256].
        absmax_offset: fp32 0-dim.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int = 64
    absmax_scale: Tensor | None = None
    absmax_map: Tensor | None = None
    absmax_offset: Tensor | None = None

    def __post_init__(self) -> None:
        if min(self.shape) < 0:
            raise ValueError(f"NF4Weight: expected shape (N, K) of sizes >= 0, got {self.shape}")
        size = (self.shape[0] * self.shape[1] + 1) // 2
        check_shape("NF4Weight", "packed", self.packed, (size,))
        check_nf4("NF4Weight", self.tensors)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.absmax_scale is not None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors if isinstance(tensor, Tensor))

    @functools.cached_property
    def tensors(self) -> NF4Tensors:
        """What kernels read of it."""
        return NF4Tensors(
            self.packed,
            self.absmax,
            self.codebook,
            self.absmax_scale,
            self.absmax_map,
            self.absmax_offset,
            self.block_size,
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> NF4Weight:
        """The same matrix with `fn` applied to every tensor."""
        tensors = {
            field.name: fn(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> NF4Weight:
        """The same matrix on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def check_finite(self, name: str = "weight") -> None:
        """Raise ValueError, naming the tensor, if a scale is infinite or NaN: the matrix would poison every output."""
        for field in ("absmax", "codebook", "absmax_scale", "absmax_map", "absmax_offset"):
            tensor = getattr(self, field)
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: expected finite NF4 scales, got infinity or NaN in {field}")

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> NF4Weight:
        """Read the matrix `name` from the tensors of a checkpoint saved by bitsandbytes.

        Args:
            tensors: at least `name`, `name.absmax`, `name.quant_map`, `name.quant_state.bitsandbytes__nf4` and, with
                double quantization, `name.nested_absmax` and `name.nested_quant_map`.

        Raises:
            ValueError: something is missing, not NF4, inconsistent or not finite; the message names the tensor.
        """
        from ladder_kernels.bitsandbytes_format import read_bitsandbytes

        return read_bitsandbytes(tensors, name)

    def to_bitsandbytes(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors that bitsandbytes would save for this matrix: the inverse of `from_bitsandbytes`."""
        from ladder_kernels.bitsandbytes_format import write_bitsandbytes

        return write_bitsandbytes(self, name)


def dynamic_map() -> Tensor:
    """The 256 values of 8-bit scales, fp32 ascending: seven decades, finer towards 1, both signs, 0 and 1.

    Decade i holds 2^i values, the midpoints of an even grid over [0.1, 1] * 10^(i-6). Source: arXiv 1511.04561.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        grid = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        magnitudes = 10 ** (decade - 6) * ((grid[:-1] + grid[1:]) / 2)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantize a matrix to NF4, bit for bit as bitsandbytes does on a CPU.

    A block of zeros decodes to zeros. A NaN makes its block NaN and, with double quantization, the whole matrix, whose
    scales share an offset: see `NF4Weight.check_finite`.

    Args:
        weight: [N, K] fp32, bf16 or fp16.
        block_size: weights per scale, one of `reference.BLOCK_SIZES`.
        double_quant: whether to quantize the scales too. Their offset is torch.mean(absmax), whose last bit may depend
            on the number of threads.

    Raises:
        ValueError, TypeError: not a matrix, empty, not one of these dtypes or block sizes.
    """
    op = "quantize_nf4"
    check_shape(op, "weight", weight, ("N", "K"))
    check_dtype(op, "weight", weight.dtype, COMPUTE_DTYPES)
    check_block_size(op, block_size)
    if weight.numel() == 0:
        raise ValueError(f"{op}: expected a matrix with weights in it, got shape {list(weight.shape)}")
    weight = weight.detach().contiguous()
    codebook = torch.tensor(NF4_CODES, dtype=torch.float32, device=weight.device)
    thresholds = (codebook[:-1] + codebook[1:]) / 2
    kernels = _kernels(weight) if runs_eagerly(weight) else reference
    packed, absmax = kernels.quantize_nf4(weight, thresholds, block_size)
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return NF4Weight(packed, absmax, codebook, shape, weight.dtype, block_size)
    offset, absmax_map = absmax.mean(), dynamic_map().to(weight.device)
    # A CPU has so few scales that plain torch does; on a GPU torch divides by multiplying with a reciprocal.
    kernels = reference if kernels is native else kernels
    codes, scale = kernels.quantize_absmax(absmax, absmax_map, offset)
    return NF4Weight(packed, codes, codebook, shape, weight.dtype, block_size, scale, absmax_map, offset)


def dequantize_rows(nf4: NF4Tensors, first_row: int, out: Tensor) -> None:
    """Decode rows [first_row, first_row + P) into out [P, K], natively where that is possible. Nothing is checked."""
    _kernels(out).dequantize_nf4(nf4, first_row, out)


def _kernels(weight: Tensor) -> ModuleType:
    """The module whose kernels read or write a weight: `native` lacks `quantize_absmax`, else all have the same."""
    if uses_triton(weight):
        from ladder_kernels.gpu import nf4

        return nf4
    return native if weight.is_cpu and native.available() else reference


@torch.library.custom_op(
    "ladder::dequantize_nf4",
    mutates_args=("out",),
    schema=f"(int first_row, Tensor(a!) out, {NF4_SCHEMA}) -> ()",
)
def _dequantize_nf4(first_row: int, out: Tensor, *nf4: Any) -> None:
    tensors = NF4Tensors(*nf4)
    check_nf4("dequantize_nf4", tensors)
    check_dequantize(tensors, first_row, out)
    dequantize_rows(tensors, first_row, out)


@_dequantize_nf4.register_fake
def _(first_row: int, out: Tensor, *nf4: Any) -> None:
    tensors = NF4Tensors(*nf4)
    check_nf4("dequantize_nf4", tensors)
    check_dequantize(tensors, first_row, out)


def dequantize_nf4(nf4_weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode a matrix: codebook value * absmax in fp32, rounded once to `dtype`.

    Args:
        nf4_weight: the matrix [N, K].
        dtype: fp32, bf16 or fp16.
        out: contiguous [N, K] of that dtype to write to. Fresh memory costs more than the decode: pass it in hot paths.

    Returns:
        out, or a new tensor [N, K].

    Raises:
        ValueError, TypeError: `dtype` is another one, or `out` has another shape, dtype, device, is not contiguous or
            requires a gradient.
    """
    check_dtype("dequantize_nf4", "dtype", dtype, COMPUTE_DTYPES)
    if out is None:
        out = torch.empty(nf4_weight.shape, dtype=dtype, device=nf4_weight.device)
    check_shape("dequantize_nf4", "out", out, nf4_weight.shape)
    check_dtype("dequantize_nf4", "out", out.dtype, (dtype,))
    check_no_gradient("dequantize_nf4", "out", out, "pass a tensor that does not, or call it under torch.no_grad()")
    nf4 = nf4_weight.tensors
    if runs_eagerly(out, nf4.packed):
        check_dequantize(nf4, 0, out)
        dequantize_rows(nf4, 0, out)
        if not out.is_inference():
            # Native code wrote behind autograd's back: whoever saved `out` for backward must find out.
            torch.autograd.graph.increment_version(out)
    else:
        _dequantize_nf4(0, out, *nf4)
    return out
