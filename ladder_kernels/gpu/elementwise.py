"""RMSNorm, rotary embedding and SwiGLU, each in one pass over memory; formulas in `ladder_kernels.elementwise`.

Bound by memory: every element is read and written once. 16-bit intermediates are rounded where transformers rounds
them: the norm before the weight, silu before the product, the rotary products before their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels import reference
from ladder_kernels.gpu.device_fns import inverse_rms, load_angles, normed_rows, silu_times, turned
from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.spec import POINTERS, KernelSpec, architectures_of

# A row is held in registers: 16 values by each of 1024 threads. 32 of them spill.
MAX_NORM_WIDTH = 16384

_ELEMENTS_PER_THREAD = 16  # two 16-byte loads of 16-bit values
_FULL_TILE = 2048


class Tile(NamedTuple):
    """What one thread block works on: rows x columns, powers of two."""

    rows: int
    columns: int
    num_warps: int


def norm_tile(width: int) -> Tile:
    """Whole rows, for the mean needs them; several where they are short, as the heads of a query norm are."""
    columns = triton.next_power_of_2(width)
    return _tile(max(1, _FULL_TILE // columns), columns)


def rotary_tile(heads: int, half: int) -> Tile:
    """Heads x half a head of one token."""
    columns = triton.next_power_of_2(half)
    return _tile(min(triton.next_power_of_2(heads), max(1, _FULL_TILE // columns)), columns)


def swiglu_tile(width: int) -> Tile:
    columns = min(triton.next_power_of_2(width), _FULL_TILE)
    return _tile(_FULL_TILE // columns, columns)


def _tile(rows: int, columns: int) -> Tile:
    return Tile(rows, columns, min(32, max(1, rows * columns // (32 * _ELEMENTS_PER_THREAD))))


@triton.jit(do_not_specialize=["R"])
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, out_ptr, R, D, x_stride, epsilon, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < R) & (columns < D)[None, :]
    x = tl.load(x_ptr + rows * x_stride + columns[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0)
    normed = normed_rows(x, inverse_rms(x.to(tl.float32), D, epsilon), weight)
    tl.store(out_ptr + rows * D + columns[None, :], normed, mask=mask)


@triton.jit
def _rotary_fwd_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, H, HALF, x_stride, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = columns < HALF
    mask = (heads < H) & in_half
    offsets = heads * (2 * HALF) + columns
    first = tl.load(x_ptr + token * x_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + token * x_stride + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    angles = load_angles(cos_ptr, sin_ptr, token * (2 * HALF) + columns, in_half, HALF)
    dtype = out_ptr.dtype.element_ty
    out_first, out_second = turned(first, second, angles, dtype)
    out_ptr += token * H * (2 * HALF)
    tl.store(out_ptr + offsets, out_first.to(dtype), mask=mask)
    tl.store(out_ptr + offsets + HALF, out_second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, R, F, gate_stride, up_stride, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (rows < R) & (columns < F)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * F + columns, silu_times(gate, up, out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`reference.rms_norm` of [R, D] with contiguous rows and weight. D above MAX_NORM_WIDTH is left to it."""
    rows, width = x.shape
    if width > MAX_NORM_WIDTH:
        return reference.rms_norm(x, weight, epsilon)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = norm_tile(width)
    if out.numel() > 0:
        launch(
            _rms_norm_fwd_kernel, (triton.cdiv(rows, tile.rows),), x, weight, out, rows, width, x.stride(0), epsilon,
            BLOCK_R=tile.rows, BLOCK_D=tile.columns, num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotary` of [T, H, d] with contiguous tokens and tables, to the bit."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, size = x.shape
    tile = rotary_tile(heads, size // 2)
    if out.numel() > 0:
        # Products are rounded before their sum in fp32 as well.
        launch(
            _rotary_fwd_kernel, (tokens, triton.cdiv(heads, tile.rows)),
            x, cos, sin, out, heads, size // 2, x.stride(0), BLOCK_H=tile.rows, BLOCK_HALF=tile.columns,
            num_warps=tile.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """`reference.swiglu` of [R, F] with contiguous rows, into contiguous `out`, which may be gate."""
    rows, width = gate.shape
    tile = swiglu_tile(width)
    if out.numel() > 0:
        launch(
            _swiglu_fwd_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns)),
            gate, up, out, rows, width, gate.stride(0), up.stride(0), BLOCK_R=tile.rows, BLOCK_F=tile.columns,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def specs() -> Iterator[KernelSpec]:
    """Widths and heads of the named models, from Qwen2.5-0.5B to Llama-3.1-8B and twice that."""
    for dtype, pointer in POINTERS.items():
        architectures = architectures_of(dtype)
        for tile in {norm_tile(width): None for width in (64, 128, 896, 2048, 3584, 8192, MAX_NORM_WIDTH)}:
            yield _spec(_rms_norm_fwd_kernel, "rms_norm", pointer, tile, ("R", "D"), ("x_stride",), architectures)
        for tile in {
            rotary_tile(heads, half): None for heads, half in ((2, 32), (14, 32), (4, 64), (28, 64), (64, 64))
        }:
            yield _spec(_rotary_fwd_kernel, "rotary", pointer, tile, ("H", "HALF"), ("x_stride",), architectures)
        for tile in {swiglu_tile(width): None for width in (256, 1024, 18944)}:
            yield _spec(
                _swiglu_fwd_kernel, "swiglu", pointer, tile, ("R", "F"), ("gate_stride", "up_stride"), architectures
            )


def _spec(
    kernel: Any,
    op: str,
    pointer: str,
    tile: Tile,
    sizes: tuple[str, str],
    strides: tuple[str, ...],
    architectures: tuple[int, ...],
) -> KernelSpec:
    types = {name: pointer for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "i32" for name in (*sizes, *strides)}
    if "epsilon" in kernel.arg_names:
        types["epsilon"] = "fp32"
    rows, columns = (name for name in kernel.arg_names if name.startswith("BLOCK_"))
    return KernelSpec(
        name=f"{op}.{kernel.__name__}.{pointer[1:]}.{tile.rows}x{tile.columns}",
        kernel=kernel,
        types=types,
        constants={rows: tile.rows, columns: tile.columns},
        divisible=(sizes[1], *strides),
        num_warps=tile.num_warps,
        architectures=architectures,
    )
