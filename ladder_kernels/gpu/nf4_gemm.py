"""The fused NF4 product: out^T = decode(W) x^T on tensor cores, W decoded tile by tile on its way to them.

x [M, K] bf16 or fp16, W NF4 [N, K] with K and block_size multiples of 64 -> out [M, N] in x.dtype, with one of

    out = x W^T + bias,    out = residual + (x W^T + bias),    out = silu(x W_gate^T) * (x W_up^T)

W is the A operand, so that each weight is decoded by one thread only, and the packed bytes and x stay as they are in
memory. The decode is exact: fp32 code * fp32 absmax, rounded once; products are summed in fp32, or on request in fp16
over 64 columns at a time. With few tokens K is split among thread blocks, whose fp32 sums a second kernel adds in a
fixed order: no atomics, the same bits on every run.

The tile that multiplies in one iteration was decoded in the one before. That hides the decode behind the tensor cores,
and it keeps Triton from seeing bytes behind the operand: where it does (3.6 to 3.7) it spreads both operands for 8-bit
data, which costs 64 x 2 register moves per iteration of a 128 x 128 x 64 tile on sm_86, 473 instructions for 246.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.gpu.device_fns import nested_absmax, rounded, silu_times
from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.spec import ARCHITECTURES, KernelSpec
from ladder_kernels.launch import GROUP, HALF_PRECISION_ARCHITECTURES, GemmConfig, GpuLinearPlan, gemm_config
from ladder_kernels.nf4_tensors import NF4Tensors
from ladder_kernels.reference import ABSMAX_BLOCK

_ABSMAX_BLOCK = tl.constexpr(ABSMAX_BLOCK)
_REDUCE_BLOCK = 512
_GROUP_M = 8  # tiles of tokens that pass over W together


@triton.jit
def _code_table(codebook_ptr, IS_WIDE: tl.constexpr):
    """The 16 codes, or for each byte its two codes in the halves of 64 bits, that of the high nibble above."""
    if IS_WIDE:
        octet = tl.arange(0, 256)
        even = tl.load(codebook_ptr + (octet >> 4)).to(tl.uint32, bitcast=True).to(tl.int64)
        odd = tl.load(codebook_ptr + (octet & 15)).to(tl.uint32, bitcast=True).to(tl.int64)
        return (even << 32) | odd
    else:
        return tl.load(codebook_ptr + tl.arange(0, 16))


@triton.jit
def _decoded_tile(
    packed_ptr, absmax_ptr, absmax_scale_ptr, absmax_map_ptr, absmax_offset, table, row, col, col_end, rows, cols,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS_PER_SCALE: tl.constexpr,
    IS_NESTED: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_K] of the given rows from column `col` on; zero outside of `rows` and from `col_end`."""
    HALF: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // 64
    byte = col // 2 + tl.arange(0, HALF)
    group = col // 64 + tl.arange(0, GROUPS)
    # The scalar alone decides for a single group: columns come in whole ones.
    is_byte = ((row < rows) & (col < col_end))[:, None]
    is_block = is_byte
    if GROUPS > 1:
        is_byte = is_byte & (byte < col_end // 2)[None, :]
        is_block = is_block & (group < col_end // 64)[None, :]
    address = packed_ptr + row.to(tl.int64)[:, None] * (cols // 2) + byte[None, :]
    octets = tl.load(address, mask=is_byte, other=0)
    block = (row[:, None] * (cols // 64) + group[None, :]) // GROUPS_PER_SCALE
    if IS_NESTED:
        code = tl.load(absmax_ptr + block, mask=is_block, other=0)
        factor = tl.load(absmax_scale_ptr + block // _ABSMAX_BLOCK, mask=is_block, other=0.0)
        scale = nested_absmax(code, factor, absmax_map_ptr, absmax_offset)
    else:
        scale = tl.load(absmax_ptr + block, mask=is_block, other=0.0)
    index = octets.to(tl.int32).reshape(BLOCK_N * HALF)
    if IS_WIDE:
        pair = tl.gather(table, index, 0)
        even = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        odd = pair.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        even = tl.gather(table, index >> 4, 0)
        odd = tl.gather(table, index & 15, 0)
    even = (even.reshape(BLOCK_N, GROUPS, 32) * scale[:, :, None]).to(DTYPE)
    odd = (odd.reshape(BLOCK_N, GROUPS, 32) * scale[:, :, None]).to(DTYPE)
    return tl.join(even, odd).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _accumulated(accumulator, weight, x, HALF_PRECISION: tl.constexpr):
    """accumulator + weight @ x; in half precision only the sum over the columns of this tile is."""
    if HALF_PRECISION:
        return accumulator + tl.dot(weight, x, out_dtype=tl.float16).to(tl.float32)
    else:
        return tl.dot(weight, x, accumulator)


@triton.jit(do_not_specialize=["tokens"])
def _nf4_gemm_fwd_kernel(
    x_ptr,
    packed_ptr, absmax_ptr, codebook_ptr, absmax_scale_ptr, absmax_map_ptr, absmax_offset_ptr,
    up_packed_ptr, up_absmax_ptr, up_codebook_ptr, up_absmax_scale_ptr, up_absmax_map_ptr, up_absmax_offset_ptr,
    bias_ptr, residual_ptr, out_ptr, tokens, rows, cols, cols_per_split,
    GROUPS_PER_SCALE: tl.constexpr, IS_NESTED: tl.constexpr, IS_PAIR: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, IS_SPLIT: tl.constexpr, HALF_PRECISION: tl.constexpr, IS_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of out in the type of x, transposed while it is summed; with IS_SPLIT that of one part's sums, fp32.

    Of a pair the first weight is the gate.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # Neighbouring thread blocks share tiles of x and of W in the second-level cache.
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * tiles_n) % height
    pid_n = pid % (GROUP_M * tiles_n) // height
    token = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    col_begin = split * cols_per_split
    col_end = tl.minimum(col_begin + cols_per_split, cols)

    table = _code_table(codebook_ptr, IS_WIDE)
    offset = 0.0
    if IS_NESTED:
        offset = tl.load(absmax_offset_ptr)
    weight = _decoded_tile(
        packed_ptr, absmax_ptr, absmax_scale_ptr, absmax_map_ptr, offset, table, row, col_begin, col_end, rows, cols,
        DTYPE, BLOCK_N, BLOCK_K, GROUPS_PER_SCALE, IS_NESTED, IS_WIDE,
    )  # fmt: skip
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if IS_PAIR:
        up_table = _code_table(up_codebook_ptr, IS_WIDE)
        up_offset = 0.0
        if IS_NESTED:
            up_offset = tl.load(up_absmax_offset_ptr)
        up_weight = _decoded_tile(
            up_packed_ptr, up_absmax_ptr, up_absmax_scale_ptr, up_absmax_map_ptr, up_offset, up_table, row, col_begin,
            col_end, rows, cols, DTYPE, BLOCK_N, BLOCK_K, GROUPS_PER_SCALE, IS_NESTED, IS_WIDE,
        )  # fmt: skip
        up_accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    # Results of tokens that do not exist are not stored. Tiles of 64 and more, whose 64 columns are always there, read
    # the last one instead, without a mask: 12 instructions of 273 at 128 x 128 x 64 on sm_86. Narrow ones, which may
    # be 15 parts of 16 empty, read nothing.
    x_token = tl.minimum(token, tokens - 1) if BLOCK_M >= 64 else token
    x_row = x_ptr + x_token.to(tl.int64)[None, :] * cols
    for col in tl.range(col_begin, col_end, BLOCK_K, num_stages=STAGES):
        k = col + tl.arange(0, BLOCK_K)
        if BLOCK_M >= 64:
            x = tl.load(x_row + k[:, None])
        else:
            is_x = (token < tokens)[None, :] & (k < col_end)[:, None]
            x = tl.load(x_row + k[:, None], mask=is_x, other=0.0)
        accumulator = _accumulated(accumulator, weight, x, HALF_PRECISION)
        weight = _decoded_tile(
            packed_ptr, absmax_ptr, absmax_scale_ptr, absmax_map_ptr, offset, table, row, col + BLOCK_K, col_end, rows,
            cols, DTYPE, BLOCK_N, BLOCK_K, GROUPS_PER_SCALE, IS_NESTED, IS_WIDE,
        )  # fmt: skip
        if IS_PAIR:
            up_accumulator = _accumulated(up_accumulator, up_weight, x, HALF_PRECISION)
            up_weight = _decoded_tile(
                up_packed_ptr, up_absmax_ptr, up_absmax_scale_ptr, up_absmax_map_ptr, up_offset, up_table, row,
                col + BLOCK_K, col_end, rows, cols, DTYPE, BLOCK_N, BLOCK_K, GROUPS_PER_SCALE, IS_NESTED, IS_WIDE,
            )  # fmt: skip

    place = token.to(tl.int64)[None, :] * rows + row[:, None]
    mask = (token < tokens)[None, :] & (row < rows)[:, None]
    if IS_SPLIT:
        size = tokens.to(tl.int64) * rows
        if IS_PAIR:
            tl.store(out_ptr + (2 * split) * size + place, accumulator, mask=mask)
            tl.store(out_ptr + (2 * split + 1) * size + place, up_accumulator, mask=mask)
        else:
            tl.store(out_ptr + split * size + place, accumulator, mask=mask)
    else:
        if HAS_BIAS:
            accumulator += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        if IS_PAIR:
            out = silu_times(rounded(accumulator, DTYPE), rounded(up_accumulator, DTYPE), DTYPE)
        else:
            out = accumulator.to(DTYPE)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
            out = (residual + out.to(tl.float32)).to(DTYPE)
        tl.store(out_ptr + place, out, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _nf4_gemm_reduce_fwd_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr, size, rows, splits,
    IS_PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of all splits in order, and the epilogue. partial [splits, 2 of a pair, tokens, rows], `size` items."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    PARTS: tl.constexpr = 2 if IS_PAIR else 1
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    up_total = tl.zeros((BLOCK,), tl.float32)
    address = partial_ptr + place
    for _ in range(splits):
        total += tl.load(address, mask=mask, other=0.0)
        if IS_PAIR:
            up_total += tl.load(address + size, mask=mask, other=0.0)
        address += PARTS * size
    if HAS_BIAS:
        total += tl.load(bias_ptr + place % rows, mask=mask, other=0.0).to(tl.float32)
    if IS_PAIR:
        out = silu_times(rounded(total, DTYPE), rounded(up_total, DTYPE), DTYPE)
    else:
        out = total.to(DTYPE)
    if HAS_RESIDUAL:
        out = (tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32) + out.to(tl.float32)).to(DTYPE)
    tl.store(out_ptr + place, out, mask=mask)


def _weight_arguments(nf4: NF4Tensors) -> tuple[Tensor, ...]:
    """The six tensors as the kernel takes them; where scales are plain, something in place of the three it ignores."""
    scale, absmax_map, offset = nf4.absmax_scale, nf4.absmax_map, nf4.absmax_offset
    if scale is None or absmax_map is None or offset is None:
        scale = absmax_map = offset = nf4.codebook
    return nf4.packed, nf4.absmax, nf4.codebook, scale, absmax_map, offset


def nf4_gemm(
    x: Tensor,
    nf4: NF4Tensors,
    up: NF4Tensors | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: GpuLinearPlan,
    scratch: Tensor,
    out: Tensor,
    *,
    half_precision: bool = False,
) -> None:
    """Write the product of x [M, K] and a weight, or the activated product of a pair, to out [M, N].

    Args:
        up: the second weight of a pair, of which `nf4` is the gate: same shape, block size and kind of scales.
        bias: [N], not with a pair. residual: [M, N], may be `out`.
        plan: from `gpu_linear_plan` with the same arguments; its scratch_bytes are read from `scratch`, uint8.
        half_precision: sum in fp16 within the columns of a tile, 64 or 128; x in fp16 only.
    """
    assert plan.config is not None
    config, (tokens, cols), rows = plan.config, x.shape, out.shape[1]
    is_split, is_pair = plan.splits > 1, up is not None
    target = scratch[: plan.scratch_bytes].view(torch.float32) if is_split else out
    grid = (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(rows, config.block_rows), plan.splits)
    launch(
        _nf4_gemm_fwd_kernel, grid,
        x, *_weight_arguments(nf4), *_weight_arguments(up or nf4),
        x if bias is None else bias, x if residual is None else residual, target,
        tokens, rows, cols, plan.cols_per_split,
        GROUPS_PER_SCALE=nf4.block_size // GROUP, IS_NESTED=nf4.absmax_scale is not None, IS_PAIR=is_pair,
        HAS_BIAS=bias is not None and not is_split, HAS_RESIDUAL=residual is not None and not is_split,
        IS_SPLIT=is_split, HALF_PRECISION=half_precision, **_tile_constants(config),
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if is_split:
        _add_splits(target, plan.splits, is_pair, bias, residual, out)


def _add_splits(
    partial: Tensor, splits: int, is_pair: bool, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    """out = the sum of partial [splits, 2 of a pair, M, N] fp32 over its first dimension, and the epilogue."""
    launch(
        _nf4_gemm_reduce_fwd_kernel, (triton.cdiv(out.numel(), _REDUCE_BLOCK),),
        partial, out if bias is None else bias, out if residual is None else residual, out,
        out.numel(), out.shape[1], splits,
        IS_PAIR=is_pair, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, BLOCK=_REDUCE_BLOCK,
        num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def _tile_constants(config: GemmConfig) -> dict[str, Any]:
    tile = {"BLOCK_M": config.block_tokens, "BLOCK_N": config.block_rows, "BLOCK_K": config.block_cols}
    return tile | {"IS_WIDE": config.is_wide, "GROUP_M": _GROUP_M, "STAGES": config.num_stages}


_FLAGS = ("IS_NESTED", "IS_PAIR", "HAS_BIAS", "HAS_RESIDUAL", "IS_SPLIT", "HALF_PRECISION")


def specs() -> Iterator[KernelSpec]:
    """Every configuration with what fills registers most, nested scales and an epilogue; other variants once."""
    for is_pair in (False, True):
        flags = ("IS_PAIR",) if is_pair else ()
        heaviest = ("IS_NESTED", *(flags or ("HAS_BIAS", "HAS_RESIDUAL")))
        for config in {gemm_config(tokens, is_pair): None for tokens in (1, 32, 64, 128)}:
            yield _gemm_spec("bf16", config, *heaviest)
            yield _gemm_spec("fp16", config, *heaviest)
            yield _gemm_spec("fp16", config, *heaviest, "HALF_PRECISION")
            if not is_pair:
                yield _gemm_spec("bf16", config, "IS_NESTED", "IS_SPLIT")
        yield _gemm_spec("bf16", gemm_config(128, is_pair), *flags)
        for dtype in ("bf16", "fp16"):
            yield _reduce_spec(dtype, *heaviest[1:])


def _gemm_spec(dtype: str, config: GemmConfig, *set_flags: str) -> KernelSpec:
    flags = {flag: flag in set_flags for flag in _FLAGS}
    weight = {
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if flags["IS_NESTED"] else "*fp32",
        **dict.fromkeys(("codebook_ptr", "absmax_scale_ptr", "absmax_map_ptr", "absmax_offset_ptr"), "*fp32"),
    }
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "out_ptr"), f"*{dtype}")
    if flags["IS_SPLIT"]:
        pointers["out_ptr"] = "*fp32"
    sizes = dict.fromkeys(("tokens", "rows", "cols", "cols_per_split"), "i32")
    name = "x".join(str(size) for size in config[:3]) + "".join(f".{flag.lower()}" for flag in flags if flags[flag])
    weights = config.block_rows * config.block_cols * (2 if flags["IS_PAIR"] else 1)
    return KernelSpec(
        name=f"nf4_gemm.fwd.{dtype}.{name}.stages{config.num_stages}",
        kernel=_nf4_gemm_fwd_kernel,
        types=pointers | weight | {f"up_{key}": value for key, value in weight.items()} | sizes,
        constants={**flags, "GROUPS_PER_SCALE": 1, **_tile_constants(config)},
        divisible=("rows", "cols", "cols_per_split"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        architectures=HALF_PRECISION_ARCHITECTURES if flags["HALF_PRECISION"] else ARCHITECTURES,
        uses_tensor_cores=True,
        enable_fp_fusion=False,
        # What looks up nibbles, or promotes fp16 sums, takes more instructions by intent.
        weights_per_iteration=weights if config.is_wide and not flags["HALF_PRECISION"] else 0,
    )


def _reduce_spec(dtype: str, *set_flags: str) -> KernelSpec:
    pointers = dict.fromkeys(("bias_ptr", "residual_ptr", "out_ptr"), f"*{dtype}")
    flags = {flag: flag in set_flags for flag in ("IS_PAIR", "HAS_BIAS", "HAS_RESIDUAL")}
    return KernelSpec(
        name=f"nf4_gemm.reduce.{dtype}" + "".join(f".{flag.lower()}" for flag in flags if flags[flag]),
        kernel=_nf4_gemm_reduce_fwd_kernel,
        types=pointers | {"partial_ptr": "*fp32", "size": "i32", "rows": "i32", "splits": "i32"},
        constants={**flags, "BLOCK": _REDUCE_BLOCK},
        divisible=("size", "rows"),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
