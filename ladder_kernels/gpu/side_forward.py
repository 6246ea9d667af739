"""Forward kernels of a side layer. Every shape but the number of tokens is known when they are compiled.

    _side_qkv_fwd_kernel     heads of rms_norm(s) @ qkv^T, q and k rotated; on the way the parameters are rounded
    _side_mlp_fwd_kernel     u = s + mixed @ attention_out^T, then the whole MLP, its activation on chip: narrow layers
    _side_linear_fwd_kernel  residual + x @ weight^T                                 ] wide layers, and what backward
    _side_swiglu_fwd_kernel  silu(gate) * up, of rms_norm(u) @ gate_up^T             ] computes again

Two columns that an epilogue combines (the halves of a head, gate and up) are two accumulators of one tile, so no value
moves between threads. 16-bit values are rounded where plain torch rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ladder_kernels.gpu.device_fns import (
    inverse_rms,
    load_angles,
    normed_rows,
    rounded,
    row_products,
    silu_times,
    turned,
)
from ladder_kernels.gpu.side_weights import cast_parameters


@triton.jit
def inverse_rms_of_wide_rows(
    x_ptr, rows, row_mask, epsilon, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """1 / sqrt(mean(x^2) + epsilon) of BLOCK_M rows, fp32, where a program holds only BLOCK_K of their columns."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, S, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (cols < S)[None, :]
        x = tl.load(x_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    return tl.rsqrt(total / S + epsilon)


@triton.jit
def _normed_pair_product(
    x_ptr, norm_ptr, weight_ptr, normed_ptr, rows, row_mask, first, second, col_mask, epsilon, stores_normed,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rms_norm(x) times rows `first` and rows `second` of a weight [.., S]: two accumulators [BLOCK_M, BLOCK_N].

    Wider parameters are rounded to x's dtype. The normed rows are stored where stores_normed says so.
    """
    inverse = inverse_rms_of_wide_rows(x_ptr, rows, row_mask, epsilon, S, BLOCK_M, BLOCK_K)
    acc_first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, S, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        inside = cols < S
        mask = row_mask[:, None] & inside[None, :]
        x = tl.load(x_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0)
        norm = tl.load(norm_ptr + cols, mask=inside, other=0.0).to(x.dtype)
        normed = normed_rows(x, inverse, norm)
        if normed_ptr is not None:
            tl.store(normed_ptr + rows[:, None] * S + cols[None, :], normed, mask=mask & stores_normed)
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = tl.load(weight_ptr + first[None, :] * S + cols[:, None], mask=weight_mask, other=0.0).to(x.dtype)
        acc_first = tl.dot(normed, weight, acc_first, input_precision="ieee")
        weight = tl.load(weight_ptr + second[None, :] * S + cols[:, None], mask=weight_mask, other=0.0).to(x.dtype)
        acc_second = tl.dot(normed, weight, acc_second, input_precision="ieee")
    return acc_first, acc_second


@triton.jit
def _qkv_tile(
    s_ptr, norm_ptr, weight_ptr, cos_ptr, sin_ptr, heads_ptr, normed_ptr, row_block, column_block, T, epsilon,
    S: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, REPEATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of heads. Its columns are pairs: dimensions i and i + d/2 of one head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = heads_ptr.dtype.element_ty
    rows = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pairs = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    head, angle = pairs // HALF, pairs % HALF
    row_mask, col_mask = rows < T, head < HEADS + 2 * KV_HEADS
    first = head * HEAD_DIM + angle
    a, b = _normed_pair_product(
        s_ptr, norm_ptr, weight_ptr, normed_ptr, rows, row_mask, first, first + HALF, col_mask, epsilon,
        column_block == 0, S, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    a, b = rounded(a, DTYPE), rounded(b, DTYPE)
    mask = row_mask[:, None] & col_mask[None, :]
    angles = load_angles(cos_ptr, sin_ptr, rows[:, None] * HEAD_DIM + angle[None, :], mask, HALF)
    turned_a, turned_b = turned(a, b, angles, DTYPE)
    turns = (head < HEADS + KV_HEADS)[None, :]
    a, b = tl.where(turns, turned_a, a).to(DTYPE), tl.where(turns, turned_b, b).to(DTYPE)
    out = heads_ptr + rows[:, None] * ((HEADS + 2 * KV_HEADS * REPEATS) * HEAD_DIM)
    is_query = head < HEADS
    for repeat in tl.static_range(REPEATS):
        place = tl.where(is_query, head, HEADS + (head - HEADS) * REPEATS + repeat) * HEAD_DIM + angle
        stored = mask if repeat == 0 else mask & ~is_query[None, :]
        tl.store(out + place[None, :], a, mask=stored)
        tl.store(out + HALF + place[None, :], b, mask=stored)


@triton.jit(do_not_specialize=["T"])
def _side_qkv_fwd_kernel(
    s_ptr, cos_ptr, sin_ptr, heads_ptr, normed_ptr,
    attention_norm_ptr, qkv_ptr, attention_out_ptr, mlp_norm_ptr, gate_up_ptr, mlp_out_ptr,
    to_attention_norm_ptr, to_qkv_ptr, to_attention_out_ptr, to_mlp_norm_ptr, to_gate_up_ptr, to_mlp_out_ptr,
    T, epsilon,
    S: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, F: tl.constexpr,
    REPEATS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CAST: tl.constexpr,
):  # fmt: skip
    """heads [T, HEADS + 2 KV_HEADS REPEATS, d], the normed rows if asked for, and the parameters in the state's dtype.

    Of a row of programs the first multiply, reading wider parameters as they are; those behind them round all of them
    for the kernels to come, memory work beside tensor work. For backward each key and value head is stored once for
    every query head that reads it: attention then has no gradients of grouped heads to add up in launches of their own.
    """
    BLOCKS_N: tl.constexpr = ((HEADS + 2 * KV_HEADS) * (HEAD_DIM // 2) + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) < BLOCKS_N:
        _qkv_tile(
            s_ptr, attention_norm_ptr, qkv_ptr, cos_ptr, sin_ptr, heads_ptr, normed_ptr, tl.program_id(1),
            tl.program_id(0), T, epsilon, S, HEADS, KV_HEADS, HEAD_DIM, REPEATS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif to_qkv_ptr is not None:
        block = (tl.program_id(0) - BLOCKS_N) * tl.num_programs(1) + tl.program_id(1)
        cast_parameters(
            attention_norm_ptr, qkv_ptr, attention_out_ptr, mlp_norm_ptr, gate_up_ptr, mlp_out_ptr,
            to_attention_norm_ptr, to_qkv_ptr, to_attention_out_ptr, to_mlp_norm_ptr, to_gate_up_ptr, to_mlp_out_ptr,
            block, S, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HEADS * HEAD_DIM, F, BLOCK_CAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _side_swiglu_fwd_kernel(
    u_ptr, norm_ptr, weight_ptr, activation_ptr, T, epsilon,
    S: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """activation [T, F] = silu(gate) * up of the two halves of rms_norm(u) @ weight^T, weight [2 F, S]."""
    DTYPE: tl.constexpr = activation_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, cols < F
    gate, up = _normed_pair_product(
        u_ptr, norm_ptr, weight_ptr, None, rows, row_mask, cols, cols + F, col_mask, epsilon, False, S, BLOCK_M,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    activation = silu_times(rounded(gate, DTYPE), rounded(up, DTYPE), DTYPE)
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(activation_ptr + rows[:, None] * F + cols[None, :], activation, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _side_linear_fwd_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, T,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, N] = residual + x @ weight^T, the product rounded before the sum: x [T, K], weight [N, K]."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, cols < N
    acc = row_products(x_ptr, weight_ptr, rows, row_mask, cols, col_mask, K, 1, K, BLOCK_M, BLOCK_N, BLOCK_K)
    mask = row_mask[:, None] & col_mask[None, :]
    where = rows[:, None] * N + cols[None, :]
    residual = tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + where, (residual + rounded(acc, DTYPE)).to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _side_mlp_fwd_kernel(
    s_ptr, mixed_ptr, attention_out_ptr, norm_ptr, gate_up_ptr, mlp_out_ptr, out_ptr, T, epsilon,
    S: tl.constexpr, MIXED: tl.constexpr, F: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, S] = u + mlp(rms_norm(u)), u = s + mixed @ attention_out^T, mixed [T, MIXED].

    A program holds BLOCK_M whole rows: u, its norm and the output, padded to BLOCK_S >= S, a power of two.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_S)
    row_mask, col_mask = rows < T, cols < S
    mask = row_mask[:, None] & col_mask[None, :]
    acc = row_products(
        mixed_ptr, attention_out_ptr, rows, row_mask, cols, col_mask, MIXED, 1, MIXED, BLOCK_M, BLOCK_S, BLOCK_K
    )
    s = tl.load(s_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    u = (s + rounded(acc, DTYPE)).to(DTYPE)
    norm = tl.load(norm_ptr + cols, mask=col_mask, other=0.0)
    normed = normed_rows(u, inverse_rms(u.to(tl.float32), S, epsilon), norm)
    acc = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for f in range(0, F, BLOCK_F):
        inner = f + tl.arange(0, BLOCK_F)
        inside = inner < F
        weight_mask = col_mask[:, None] & inside[None, :]
        gate_up = gate_up_ptr + inner[None, :] * S + cols[:, None]
        gate = tl.dot(normed, tl.load(gate_up, mask=weight_mask, other=0.0), input_precision="ieee")
        up = tl.dot(normed, tl.load(gate_up + F * S, mask=weight_mask, other=0.0), input_precision="ieee")
        activation = silu_times(rounded(gate, DTYPE), rounded(up, DTYPE), DTYPE)
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = tl.load(mlp_out_ptr + cols[None, :] * F + inner[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(activation, weight, acc, input_precision="ieee")
    out = (u.to(tl.float32) + rounded(acc, DTYPE)).to(DTYPE)
    tl.store(out_ptr + rows[:, None] * S + cols[None, :], out, mask=mask)
