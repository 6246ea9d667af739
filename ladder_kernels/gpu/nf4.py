"""NF4 on a GPU: bit for bit the functions of these names in `reference` on a CPU.

Decoding and encoding are bound by memory at 2.5 bytes a 16-bit weight, so the layout is what matters: one lane decodes
16 bytes of output, from one word of packed codes, so that a warp reads and writes whole cache lines; and no
instruction per weight that a table in shared memory saves. Sixteen codes in sixteen banks never conflict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.gpu.device_fns import load_absmax
from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.spec import ARCHITECTURES, POINTERS, TURING, KernelSpec, architectures_of
from ladder_kernels.nf4_tensors import NF4Tensors
from ladder_kernels.reference import ABSMAX_BLOCK, BLOCK_SIZES

_ABSMAX_BLOCK = tl.constexpr(ABSMAX_BLOCK)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
# bitsandbytes' floor 1e-38 as bits: subnormal, so Triton would take the number for an fp64 one.
_SMALLEST_ABSMAX = tl.constexpr(0x006CE3EE)


@triton.jit(do_not_specialize=["first", "count", "block_bits"])
def _dequantize_nf4_kernel(
    packed_ptr,
    absmax_ptr,
    codebook_ptr,
    scale_ptr,
    map_ptr,
    offset_ptr,
    out_ptr,
    first,
    count,
    block_bits,
    NESTED: tl.constexpr,
    WORD: tl.constexpr,
    LANE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out[i] = codebook[code[first + i]] * absmax[(first + i) >> block_bits] for i < count.

    LANE codes are one little-endian word of type WORD: packed is aligned to it, first and count are multiples of LANE.
    """
    # Unsigned, so that quotients and remainders of powers of two are shifts and masks.
    begin = tl.program_id(0).to(tl.uint64) * (GROUPS * LANE)
    start = first.to(tl.uint64) + begin
    left = (tl.minimum(count - begin.to(tl.int64), GROUPS * LANE) // LANE).to(tl.int32)
    # One word a lane: the compiler would give a lane four, and their 64 bytes of output would be stored apart.
    group = tl.max_contiguous(tl.arange(0, GROUPS), 1)
    word = tl.load((packed_ptr + start // 2).to(tl.pointer_type(WORD)) + group, mask=group < left, other=0)
    first_block = start >> block_bits
    block = ((start - (first_block << block_bits)).to(tl.uint32) + group * LANE) >> block_bits
    absmax = load_absmax(absmax_ptr, scale_ptr, map_ptr, offset_ptr, first_block, block, group < left, NESTED)
    absmax = tl.reshape(tl.broadcast_to(absmax[:, None], [GROUPS, LANE]), [GROUPS * LANE])
    # Byte j of a word holds elements 2j and 2j+1, the even one in its high nibble.
    shift = 4 * (tl.arange(0, LANE) ^ 1)
    code = tl.reshape((word.to(tl.int32)[:, None] >> shift[None, :]) & 15, [GROUPS * LANE])
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    value = tl.gather(codebook, code, 0) * absmax
    element = tl.arange(0, GROUPS * LANE)
    tl.store(out_ptr + begin + element, value.to(out_ptr.dtype.element_ty), mask=element // LANE < left)


@triton.jit(do_not_specialize=["first", "count", "block_bits"])
def _dequantize_nf4_ragged_kernel(
    packed_ptr,
    absmax_ptr,
    codebook_ptr,
    scale_ptr,
    map_ptr,
    offset_ptr,
    out_ptr,
    first,
    count,
    block_bits,
    NESTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `_dequantize_nf4_kernel` for any first, count and alignment: everything is loaded per element."""
    begin = tl.program_id(0).to(tl.uint64) * TILE
    start = first.to(tl.uint64) + begin
    element = tl.arange(0, TILE)
    mask = element < tl.minimum(count - begin.to(tl.int64), TILE).to(tl.int32)
    position = (start % 2).to(tl.uint32) + element
    octet = tl.load(packed_ptr + start // 2 + position // 2, mask=mask, other=0).to(tl.uint32)
    code = (octet >> (4 * (position % 2 ^ 1))) & 15
    first_block = start >> block_bits
    block = ((start - (first_block << block_bits)).to(tl.uint32) + element) >> block_bits
    absmax = load_absmax(absmax_ptr, scale_ptr, map_ptr, offset_ptr, first_block, block, mask, NESTED)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    value = tl.gather(codebook, code.to(tl.int32), 0) * absmax
    tl.store(out_ptr + begin + element, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_block", "count"])
def _quantize_nf4_kernel(
    weight_ptr,
    thresholds_ptr,
    packed_ptr,
    absmax_ptr,
    first_block,
    count,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTIAL: tl.constexpr,
    WORD: tl.constexpr,
    LANE: tl.constexpr,
):
    """absmax = max |w| of a block and code = number of thresholds below w / absmax, from first_block to weight `count`.

    PARTIAL is the one block that weights do not fill: it divides where full blocks multiply by the reciprocal, and its
    scale has a floor. LANE codes are stored as one little-endian word of type WORD.
    """
    TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
    tile_block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS
    begin = tile_block * BLOCK_SIZE
    left = tl.minimum(count - begin, TILE).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    # A mask of whole blocks lets a lane load 16 bytes at once.
    mask = element < left if PARTIAL else tl.broadcast_to(block[:, None] * BLOCK_SIZE < left, [BLOCKS, BLOCK_SIZE])
    weight = tl.load(weight_ptr + begin + element, mask=mask, other=0.0).to(tl.float32)
    # Magnitudes compare as integers, where NaN is above infinity: a NaN is the largest of its block.
    largest = tl.max(weight.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)
    divisor = tl.maximum(largest, _SMALLEST_ABSMAX)
    tl.store(
        absmax_ptr + tile_block + block,
        (divisor if PARTIAL else largest).to(tl.float32, bitcast=True),
        mask=block * BLOCK_SIZE < left,
    )
    divisor = divisor.to(tl.float32, bitcast=True)[:, None]
    scaled = (
        tl.div_rn(weight, divisor) if PARTIAL else weight * tl.div_rn(tl.full([BLOCKS, 1], 1.0, tl.float32), divisor)
    )
    scaled = tl.reshape(scaled, [TILE])
    # Binary search: the first two comparisons take few thresholds, the others look them up. NaN is never <= one.
    threshold = tl.load(thresholds_ptr + tl.arange(0, 16), mask=tl.arange(0, 16) < 15, other=float("inf"))
    code = tl.where(scaled <= tl.load(thresholds_ptr + 7), 0, 8)
    quarter = tl.where(code == 0, tl.load(thresholds_ptr + 3), tl.load(thresholds_ptr + 11))
    code += tl.where(scaled <= quarter, 0, 4)
    code += tl.where(scaled <= tl.gather(threshold, code + 1, 0), 0, 2)
    code += tl.where(scaled <= tl.gather(threshold, code, 0), 0, 1)
    shift = 4 * (tl.arange(0, LANE) ^ 1)
    word = tl.sum(tl.reshape(code, [TILE // LANE, LANE]) << shift[None, :], axis=1)
    group = tl.arange(0, TILE // LANE)
    packed_ptr = (packed_ptr + begin // 2).to(tl.pointer_type(WORD))
    tl.store(packed_ptr + group, word.to(WORD), mask=group * LANE < left)


@triton.jit(do_not_specialize=["count"])
def _quantize_absmax_kernel(absmax_ptr, map_ptr, offset_ptr, codes_ptr, scale_ptr, count, BLOCKS: tl.constexpr):
    """scale = max |absmax - offset| of 256; (absmax - offset) / scale in 65536 steps; code of the nearest map entry."""
    TILE: tl.constexpr = BLOCKS * _ABSMAX_BLOCK
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    begin = first_block * _ABSMAX_BLOCK
    left = tl.minimum(count - begin, TILE).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * _ABSMAX_BLOCK + tl.arange(0, _ABSMAX_BLOCK)[None, :]
    absmax = tl.load(absmax_ptr + begin + element, mask=element < left, other=0.0)
    centered = tl.where(element < left, absmax - tl.load(offset_ptr), 0.0)
    magnitude = centered.to(tl.int32, bitcast=True) & _MAGNITUDE
    scale = tl.max(tl.where(magnitude > _INFINITY, 0, magnitude), axis=1).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + first_block + block, scale, mask=block * _ABSMAX_BLOCK < left)
    scaled = centered * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), scale)[:, None]
    scaled = tl.reshape(scaled, [TILE])
    steps = tl.floor((tl.clamp(scaled, -1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5)
    value = tl.div_rn(steps, tl.full([TILE], 65535.0, tl.float32)) * 2.0 - 1.0
    entry = tl.arange(0, _ABSMAX_BLOCK)
    following = tl.load(map_ptr + entry + 1, mask=entry < _ABSMAX_BLOCK - 1, other=float("inf"))
    midpoint = (tl.load(map_ptr + entry) + following) * 0.5
    code = tl.zeros([TILE], tl.int32)
    for bit in tl.static_range(7, -1, -1):
        code += tl.where(value <= tl.gather(midpoint, code + ((1 << bit) - 1), 0), 0, 1 << bit)
    code = tl.where(scaled != scaled, 0, code)
    index = tl.arange(0, TILE)
    tl.store(codes_ptr + begin + index, code.to(tl.uint8), mask=index < left)


class DequantizeConfig(NamedTuple):
    """How a window of weights is decoded.

    Attributes:
        lane: weights per lane and word; 0 for the kernel that takes any alignment.
        tile: weights per thread block.
        num_warps: warps per thread block.
    """

    lane: int
    tile: int
    num_warps: int


def dequantize_config(first: int, count: int, packed_address: int, itemsize: int) -> DequantizeConfig:
    """Config to decode weights [first, first + count), whose codes are at an address, to items of `itemsize` bytes."""
    lane = 16 // itemsize
    if first % lane or count % lane or packed_address % (lane // 2):
        return DequantizeConfig(0, 1024, 4)
    # Four words a lane in flight hide memory's latency, and leave room for all threads a multiprocessor can hold.
    return DequantizeConfig(lane, 4 * 4 * 32 * lane, 4)


class QuantizeConfig(NamedTuple):
    """How matrices are encoded: blocks of weights, and of scales, per thread block."""

    blocks: int
    num_warps: int


def quantize_config(block_size: int) -> QuantizeConfig:
    """Config to encode full blocks: 16 weights a lane; 32 would take 96 registers and halve the threads in flight."""
    return QuantizeConfig(max(BLOCK_SIZES) // block_size, 8)


_ABSMAX_CONFIG = QuantizeConfig(4, 4)


def dequantize_nf4(nf4: NF4Tensors, first_row: int, out: Tensor) -> None:
    """Decode rows [first_row, first_row + P) of a matrix into contiguous out [P, K], fp32, bf16 or fp16."""
    packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, block_size = nf4
    first, count = first_row * out.shape[1], out.numel()
    if count == 0:
        return
    config = dequantize_config(first, count, packed.data_ptr(), out.element_size())
    # Without double quantization the three of the second level are None, which Triton takes for constants.
    tensors = (packed, absmax, codebook, absmax_scale, absmax_map, absmax_offset, out)
    numbers = (first, count, block_size.bit_length() - 1, absmax_scale is not None)
    kernel, constants = _dequantize_kernel(config)
    launch(
        kernel, (triton.cdiv(count, config.tile),), *tensors, *numbers, **constants,
        # A fused multiply-add would round a nested scale once.
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def quantize_nf4(weight: Tensor, thresholds: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Encode a contiguous matrix [N, K], fp32, bf16 or fp16, by thresholds fp32 [15].

    Returns:
        packed uint8 [ceil(N*K/2)] and absmax fp32 [ceil(N*K/block_size)].
    """
    count = weight.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)
    tensors = (weight, thresholds, packed, absmax)
    full = count - count % block_size
    for partial, begin, end in ((False, 0, full), (True, full, count)):
        if begin == end:
            continue
        constants = _quantize_constants(block_size, partial)
        launch(
            _quantize_nf4_kernel, (triton.cdiv(end - begin, constants["BLOCKS"] * block_size),),
            *tensors, begin // block_size, end, **constants,
            num_warps=quantize_config(block_size).num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax


def quantize_absmax(absmax: Tensor, absmax_map: Tensor, absmax_offset: Tensor) -> tuple[Tensor, Tensor]:
    """Encode scales fp32 [blocks] by an ascending map fp32 [256] around an offset fp32 0-dim.

    Returns:
        codes uint8 [blocks] and their scale fp32 [ceil(blocks/256)].
    """
    count = absmax.numel()
    codes = torch.empty(count, dtype=torch.uint8, device=absmax.device)
    scale = torch.empty(-(-count // ABSMAX_BLOCK), dtype=torch.float32, device=absmax.device)
    launch(
        _quantize_absmax_kernel, (triton.cdiv(scale.numel(), _ABSMAX_CONFIG.blocks),),
        absmax, absmax_map, absmax_offset, codes, scale, count, BLOCKS=_ABSMAX_CONFIG.blocks,
        num_warps=_ABSMAX_CONFIG.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


_WORDS = {2: tl.uint8, 4: tl.int16, 8: tl.int32}  # by the codes in them


def _dequantize_kernel(config: DequantizeConfig) -> tuple[Any, dict[str, Any]]:
    """The kernel of a config and its constants."""
    if config.lane == 0:
        return _dequantize_nf4_ragged_kernel, {"TILE": config.tile}
    groups = config.tile // config.lane
    return _dequantize_nf4_kernel, {"WORD": _WORDS[config.lane], "LANE": config.lane, "GROUPS": groups}


def _quantize_constants(block_size: int, partial: bool) -> dict[str, Any]:
    lane = 2 if partial else 8
    blocks = 1 if partial else quantize_config(block_size).blocks
    return {"BLOCK_SIZE": block_size, "BLOCKS": blocks, "PARTIAL": partial, "WORD": _WORDS[lane], "LANE": lane}


def specs() -> Iterator[KernelSpec]:
    """Every kernel in every configuration that the launchers use."""
    for dtype, pointer in POINTERS.items():
        for double_quant in (False, True):
            yield from _dequantize_specs(dtype, double_quant)
        for block_size in BLOCK_SIZES if dtype == torch.bfloat16 else (64,):
            for partial in (False, True):
                yield KernelSpec(
                    f"quantize_nf4.{'partial' if partial else 'full'}.{pointer[1:]}.{block_size}",
                    _quantize_nf4_kernel,
                    {
                        "weight_ptr": pointer,
                        "thresholds_ptr": "*fp32",
                        "packed_ptr": "*u8",
                        "absmax_ptr": "*fp32",
                        "first_block": "i32",
                        "count": "i32",
                    },
                    _quantize_constants(block_size, partial),
                    num_warps=quantize_config(block_size).num_warps,
                    architectures=architectures_of(dtype),
                    enable_fp_fusion=False,
                )
    yield KernelSpec(
        f"quantize_absmax.blocks.fp32.{_ABSMAX_CONFIG.blocks}",
        _quantize_absmax_kernel,
        {
            "absmax_ptr": "*fp32",
            "map_ptr": "*fp32",
            "offset_ptr": "*fp32",
            "codes_ptr": "*u8",
            "scale_ptr": "*fp32",
            "count": "i32",
        },
        {"BLOCKS": _ABSMAX_CONFIG.blocks},
        num_warps=_ABSMAX_CONFIG.num_warps,
        architectures=(TURING, *ARCHITECTURES),
        enable_fp_fusion=False,
    )


def _dequantize_specs(dtype: torch.dtype, double_quant: bool) -> Iterator[KernelSpec]:
    nested = dict.fromkeys(("scale_ptr", "map_ptr", "offset_ptr"), "*fp32")
    types = {"packed_ptr": "*u8", "absmax_ptr": "*u8" if double_quant else "*fp32", "codebook_ptr": "*fp32"}
    types |= nested if double_quant else {}
    types |= {"out_ptr": POINTERS[dtype], "first": "i32", "count": "i32", "block_bits": "i32"}
    shared = {"NESTED": double_quant} | ({} if double_quant else dict.fromkeys(nested))
    for name, first, count in (("words", 0, 1 << 20), ("ragged", 1, 1)):
        config = dequantize_config(first, count, 0, dtype.itemsize)
        kernel, constants = _dequantize_kernel(config)
        yield KernelSpec(
            f"dequantize_nf4.{name}.{POINTERS[dtype][1:]}.{'nested' if double_quant else 'plain'}",
            kernel,
            types,
            shared | constants,
            num_warps=config.num_warps,
            architectures=architectures_of(dtype),
            weights_per_iteration=config.tile,
            enable_fp_fusion=False,
        )
