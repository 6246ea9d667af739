"""Forward kernels of a side layer. Every shape but the number of tokens is known when they are compiled.

    _side_qkv_fwd_kernel     heads of rms_norm(s) @ qkv^T, q and k rotated; backward also keeps the normed rows
    _side_mlp_fwd_kernel     u = s + mixed @ attention_out^T, then the whole MLP, its activation on chip: narrow layers
    _side_linear_fwd_kernel  residual + x @ weight^T                                 ] wide layers, and what backward
    _side_swiglu_fwd_kernel  silu(gate) * up, of rms_norm(u) @ gate_up^T             ] computes again

Two columns that an epilogue combines (the halves of a head, gate and up) are two accumulators of one tile, so no value
moves between threads. 16-bit values are rounded where plain torch rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_rms(x_ptr, rows, row_mask, epsilon, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / sqrt(mean(x^2) + epsilon) of BLOCK_M rows, fp32."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, S, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (cols < S)[None, :]
        x = tl.load(x_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    return tl.rsqrt(total / S + epsilon)


@triton.jit
def normed_rows(x, inverse, norm):
    """norm * (x * inverse), the product rounded to x's dtype before the weight."""
    scaled = (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
    return (scaled.to(tl.float32) * norm.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 values as DTYPE would hold them."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def silu_times(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up of fp32 values that DTYPE can hold, silu rounded before the product."""
    return (rounded(gate * tl.sigmoid(gate), DTYPE) * up).to(DTYPE)


@triton.jit
def _normed_pair_product(
    x_ptr,
    norm_ptr,
    weight_ptr,
    normed_ptr,
    rows,
    row_mask,
    first,
    second,
    col_mask,
    epsilon,
    S: tl.constexpr,
    STORE_NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rms_norm(x) times rows `first` and rows `second` of a weight [.., S]: two accumulators [BLOCK_M, BLOCK_N]."""
    inverse = inverse_rms(x_ptr, rows, row_mask, epsilon, S, BLOCK_M, BLOCK_K)
    acc_first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, S, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        inside = cols < S
        mask = row_mask[:, None] & inside[None, :]
        x = tl.load(x_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0)
        norm = tl.load(norm_ptr + cols, mask=inside, other=0.0)
        normed = normed_rows(x, inverse, norm)
        if STORE_NORMED:
            tl.store(normed_ptr + rows[:, None] * S + cols[None, :], normed, mask=mask & (tl.program_id(1) == 0))
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = tl.load(weight_ptr + first[None, :] * S + cols[:, None], mask=weight_mask, other=0.0)
        acc_first = tl.dot(normed, weight, acc_first, input_precision="ieee")
        weight = tl.load(weight_ptr + second[None, :] * S + cols[:, None], mask=weight_mask, other=0.0)
        acc_second = tl.dot(normed, weight, acc_second, input_precision="ieee")
    return acc_first, acc_second


@triton.jit
def _side_qkv_fwd_kernel(
    s_ptr,
    norm_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    heads_ptr,
    normed_ptr,
    T,
    epsilon,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STORE_NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """heads [T, HEADS + 2 KV_HEADS, d]. A tile's columns are pairs: dimensions i and i + d/2 of one head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    DTYPE: tl.constexpr = heads_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pairs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, pairs < WIDTH // 2
    angle = pairs % HALF
    first = pairs // HALF * HEAD_DIM + angle
    a, b = _normed_pair_product(
        s_ptr,
        norm_ptr,
        weight_ptr,
        normed_ptr,
        rows,
        row_mask,
        first,
        first + HALF,
        col_mask,
        epsilon,
        S,
        STORE_NORMED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    a, b = rounded(a, DTYPE), rounded(b, DTYPE)
    mask = row_mask[:, None] & col_mask[None, :]
    table = rows[:, None] * HEAD_DIM + angle[None, :]
    cos_a = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    turned_a = rounded(a * cos_a, DTYPE) - rounded(b * sin_a, DTYPE)
    turned_b = rounded(b * cos_b, DTYPE) + rounded(a * sin_b, DTYPE)
    turns = (pairs < (HEADS + KV_HEADS) * HALF)[None, :]
    heads = heads_ptr + rows[:, None] * WIDTH + first[None, :]
    tl.store(heads, tl.where(turns, turned_a, a).to(DTYPE), mask=mask)
    tl.store(heads + HALF, tl.where(turns, turned_b, b).to(DTYPE), mask=mask)


@triton.jit
def _side_swiglu_fwd_kernel(
    u_ptr,
    norm_ptr,
    weight_ptr,
    activation_ptr,
    T,
    epsilon,
    S: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """activation [T, F] = silu(gate) * up of the two halves of rms_norm(u) @ weight^T, weight [2 F, S]."""
    DTYPE: tl.constexpr = activation_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, cols < F
    gate, up = _normed_pair_product(
        u_ptr,
        norm_ptr,
        weight_ptr,
        activation_ptr,
        rows,
        row_mask,
        cols,
        cols + F,
        col_mask,
        epsilon,
        S,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    activation = silu_times(rounded(gate, DTYPE), rounded(up, DTYPE), DTYPE)
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(activation_ptr + rows[:, None] * F + cols[None, :], activation, mask=mask)


@triton.jit
def _side_linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [T, N] = residual + x @ weight^T, the product rounded before the sum: x [T, K], weight [N, K]."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < K
        x = tl.load(x_ptr + rows[:, None] * K + depth[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = tl.load(weight_ptr + cols[None, :] * K + depth[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    mask = row_mask[:, None] & col_mask[None, :]
    where = rows[:, None] * N + cols[None, :]
    residual = tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + where, (residual + rounded(acc, DTYPE)).to(DTYPE), mask=mask)


@triton.jit
def _side_mlp_fwd_kernel(
    s_ptr,
    mixed_ptr,
    attention_out_ptr,
    norm_ptr,
    gate_up_ptr,
    mlp_out_ptr,
    out_ptr,
    T,
    epsilon,
    S: tl.constexpr,
    MIXED: tl.constexpr,
    F: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [T, S] = u + mlp(rms_norm(u)), u = s + mixed @ attention_out^T, mixed [T, MIXED].

    A program holds BLOCK_M whole rows: u, its norm and the output, padded to BLOCK_S >= S, a power of two.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_S)
    row_mask, col_mask = rows < T, cols < S
    mask = row_mask[:, None] & col_mask[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for k in range(0, MIXED, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < MIXED
        mixed_mask = row_mask[:, None] & inside[None, :]
        mixed = tl.load(mixed_ptr + rows[:, None] * MIXED + depth[None, :], mask=mixed_mask, other=0.0)
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = tl.load(attention_out_ptr + cols[None, :] * MIXED + depth[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(mixed, weight, acc, input_precision="ieee")
    s = tl.load(s_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    u = (s + rounded(acc, DTYPE)).to(DTYPE)
    wide = u.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / S + epsilon)
    normed = normed_rows(u, inverse, tl.load(norm_ptr + cols, mask=col_mask, other=0.0))
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
