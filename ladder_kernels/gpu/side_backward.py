"""Backward kernels of a side layer; what forward computed on the way is computed again before them.

    _side_mlp_bwd_kernel        activation, normed rows and the gradients of gate and up: one tile of [T, F]
    _side_mlp_bwd_dx_kernel     d(rms_norm) = d(gate_up) @ gate_up, and through the norm: narrow layers
    _side_qkv_bwd_dx_kernel     the same of qkv, its rotation undone on the way: narrow layers
    _side_norm_bwd_dx_kernel    through a norm                                       ] wide layers, beside torch.mm
    _side_rotary_bwd_kernel     undo the rotation of the gradients of q and k        ]

The gradients of all parameters are one launch, in `side_weights`.

Sums over tokens are never atomic: a weight's tile is summed over all tokens by one program, a norm's gradient first by
blocks of rows and then over the blocks, so the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ladder_kernels.gpu.device_fns import inverse_rms, load_angles, normed_rows, rounded, row_products, silu_times
from ladder_kernels.gpu.side_forward import inverse_rms_of_wide_rows


@triton.jit(do_not_specialize=["T"])
def _side_mlp_bwd_kernel(
    u_ptr, norm_ptr, gate_up_ptr, mlp_out_ptr, dout_ptr, normed_ptr, activation_ptr, dgate_up_ptr, T, epsilon,
    S: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """normed = rms_norm(u) [T, S]; activation [T, F] as in forward; dgate_up [T, 2 F] from d(activation) = dout @ W."""
    DTYPE: tl.constexpr = activation_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < T, cols < F
    inverse = inverse_rms_of_wide_rows(u_ptr, rows, row_mask, epsilon, S, BLOCK_M, BLOCK_K)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dactivation = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, S, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < S
        mask = row_mask[:, None] & inside[None, :]
        where = rows[:, None] * S + depth[None, :]
        norm = tl.load(norm_ptr + depth, mask=inside, other=0.0)
        normed = normed_rows(tl.load(u_ptr + where, mask=mask, other=0.0), inverse, norm)
        tl.store(normed_ptr + where, normed, mask=mask & (tl.program_id(1) == 0))
        weight_mask = inside[:, None] & col_mask[None, :]
        gate_up = gate_up_ptr + cols[None, :] * S + depth[:, None]
        gate = tl.dot(normed, tl.load(gate_up, mask=weight_mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(normed, tl.load(gate_up + F * S, mask=weight_mask, other=0.0), up, input_precision="ieee")
        dout = tl.load(dout_ptr + where, mask=mask, other=0.0)
        weight = tl.load(mlp_out_ptr + depth[:, None] * F + cols[None, :], mask=weight_mask, other=0.0)
        dactivation = tl.dot(dout, weight, dactivation, input_precision="ieee")
    gate, up = rounded(gate, DTYPE), rounded(up, DTYPE)
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(activation_ptr + rows[:, None] * F + cols[None, :], silu_times(gate, up, DTYPE), mask=mask)
    sigmoid = tl.sigmoid(gate)
    dgate = dactivation * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dactivation * gate * sigmoid
    dgate_up = dgate_up_ptr + rows[:, None] * (2 * F) + cols[None, :]
    tl.store(dgate_up, dgate.to(DTYPE), mask=mask)
    tl.store(dgate_up + F, dup.to(DTYPE), mask=mask)


@triton.jit
def _through_norm(
    dnormed, x_ptr, norm_ptr, residual_ptr, dx_ptr, rows, row_mask, epsilon, S: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Store dx = residual + d rms_norm(x)/dx of whole rows [.., BLOCK_S]; return the rows' share of d(norm weight)."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_S)
    mask = row_mask[:, None] & (cols < S)[None, :]
    where = rows[:, None] * S + cols[None, :]
    x = tl.load(x_ptr + where, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + cols, mask=cols < S, other=0.0).to(tl.float32)
    inverse = inverse_rms(x, S, epsilon)[:, None]
    scaled = x * inverse
    dscaled = dnormed * norm[None, :]
    mean = (tl.sum(dscaled * scaled, axis=1) / S)[:, None]
    residual = tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + where, (residual + inverse * (dscaled - scaled * mean)).to(DTYPE), mask=mask)
    # Rows beyond T are 0/0 where epsilon is 0.
    return tl.sum(tl.where(mask, dnormed * rounded(scaled, DTYPE), 0.0), axis=0)


@triton.jit(do_not_specialize=["T"])
def _side_mlp_bwd_dx_kernel(
    dgate_up_ptr, weight_ptr, u_ptr, norm_ptr, dout_ptr, du_ptr, dnorm_ptr, T, epsilon,
    S: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du [T, S] = dout + (dgate_up @ weight through the norm), dgate_up [T, K], weight [K, S]; dnorm [blocks, S]."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_S)
    row_mask, col_mask = rows < T, cols < S
    dnormed = row_products(dgate_up_ptr, weight_ptr, rows, row_mask, cols, col_mask, K, S, 1, BLOCK_M, BLOCK_S, BLOCK_K)
    dnorm = _through_norm(dnormed, u_ptr, norm_ptr, dout_ptr, du_ptr, rows, row_mask, epsilon, S, BLOCK_S)
    tl.store(dnorm_ptr + tl.program_id(0).to(tl.int64) * S + cols, dnorm, mask=col_mask)


@triton.jit
def _turned_back(
    dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, rows, row_mask, pairs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, OF_QUERY: tl.constexpr,
):  # fmt: skip
    """Store and return the gradients of both halves of each pair before the rotation; their mask by columns too.

    Pairs are those of query heads with OF_QUERY, else of key and value heads. Attention's gradients are [T, HEADS, d]
    each: that of a key or value head is the sum over the query heads that read it.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = dqkv_ptr.dtype.element_ty
    head, angle = pairs // HALF, pairs % HALF
    if OF_QUERY:
        inside = head < HEADS
        source = (dquery_ptr + head * HEAD_DIM + angle)[None, :]
    else:
        inside = head < HEADS + 2 * KV_HEADS
        is_value = head >= HEADS + KV_HEADS
        first = (head - tl.where(is_value, HEADS + KV_HEADS, HEADS)) * (HEADS // KV_HEADS)
        source = (tl.where(is_value, dvalue_ptr, dkey_ptr) + first * HEAD_DIM + angle)[None, :]
    mask = row_mask[:, None] & inside[None, :]
    source += rows[:, None] * (HEADS * HEAD_DIM)
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if not OF_QUERY:
        for _ in tl.static_range(1, HEADS // KV_HEADS):
            source += HEAD_DIM
            a += tl.load(source, mask=mask, other=0.0).to(tl.float32)
            b += tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    turns = row_mask[:, None] & (head < HEADS + KV_HEADS)[None, :]
    table = rows[:, None] * HEAD_DIM + angle[None, :]
    cos_a, sin_a, cos_b, sin_b = load_angles(cos_ptr, sin_ptr, table, turns, HALF)
    a, b = (a * cos_a + b * sin_b).to(DTYPE), (b * cos_b - a * sin_a).to(DTYPE)
    dqkv = dqkv_ptr + rows[:, None] * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + (head * HEAD_DIM + angle)[None, :]
    tl.store(dqkv, a, mask=mask)
    tl.store(dqkv + HALF, b, mask=mask)
    return a, b, inside


@triton.jit
def _turned_back_product(
    dnormed, dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, weight_ptr, rows, row_mask, cols,
    S: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, OF_QUERY: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dnormed + dqkv @ weight of the query heads, or of the key and value heads; dqkv from `_turned_back`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    BEGIN: tl.constexpr = 0 if OF_QUERY else HEADS * HALF
    END: tl.constexpr = HEADS * HALF if OF_QUERY else (HEADS + 2 * KV_HEADS) * HALF
    for k in range(BEGIN, END, BLOCK_K):
        pairs = k + tl.arange(0, BLOCK_K)
        a, b, inside = _turned_back(
            dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, rows, row_mask, pairs, HEADS, KV_HEADS,
            HEAD_DIM, OF_QUERY,
        )  # fmt: skip
        mask = inside[:, None] & (cols < S)[None, :]
        weight = weight_ptr + (pairs // HALF * HEAD_DIM + pairs % HALF)[:, None] * S + cols[None, :]
        dnormed = tl.dot(a, tl.load(weight, mask=mask, other=0.0), dnormed, input_precision="ieee")
        dnormed = tl.dot(b, tl.load(weight + HALF * S, mask=mask, other=0.0), dnormed, input_precision="ieee")
    return dnormed


@triton.jit(do_not_specialize=["T"])
def _side_qkv_bwd_dx_kernel(
    dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, weight_ptr, s_ptr, norm_ptr, du_ptr, dqkv_ptr, ds_ptr,
    dnorm_ptr, T, epsilon,
    S: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dqkv [T, N] before the rotation; ds [T, S] = du + (dqkv @ weight through the norm), weight [N, S]."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_S)
    row_mask = rows < T
    dnormed = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for of_query in tl.static_range(2):
        dnormed = _turned_back_product(
            dnormed, dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, weight_ptr, rows, row_mask, cols,
            S, HEADS, KV_HEADS, HEAD_DIM, of_query == 0, BLOCK_K,
        )  # fmt: skip
    dnorm = _through_norm(dnormed, s_ptr, norm_ptr, du_ptr, ds_ptr, rows, row_mask, epsilon, S, BLOCK_S)
    tl.store(dnorm_ptr + tl.program_id(0).to(tl.int64) * S + cols, dnorm, mask=cols < S)


@triton.jit(do_not_specialize=["T"])
def _side_rotary_bwd_kernel(
    dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, T,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dqkv [T, N] before the rotation; the first programs along the second axis are those of the query heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    QUERY_BLOCKS: tl.constexpr = (HEADS * HALF + BLOCK_N - 1) // BLOCK_N
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pairs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(1) < QUERY_BLOCKS:
        _turned_back(
            dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, rows, rows < T, pairs, HEADS, KV_HEADS,
            HEAD_DIM, True,
        )  # fmt: skip
    else:
        _turned_back(
            dquery_ptr, dkey_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr, rows, rows < T,
            pairs - QUERY_BLOCKS * BLOCK_N + HEADS * HALF, HEADS, KV_HEADS, HEAD_DIM, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _side_norm_bwd_dx_kernel(
    dnormed_ptr, x_ptr, norm_ptr, residual_ptr, dx_ptr, dnorm_ptr, T, epsilon,
    S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dx [T, S] = residual + (dnormed through the norm), BLOCKS times BLOCK_M rows a program; dnorm [programs, S]."""
    cols = tl.arange(0, BLOCK_S)
    col_mask = cols < S
    dnorm = tl.zeros((BLOCK_S,), tl.float32)
    for block in range(BLOCKS):
        rows = ((tl.program_id(0) * BLOCKS + block) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_mask = rows < T
        mask = row_mask[:, None] & col_mask[None, :]
        dnormed = tl.load(dnormed_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dnorm += _through_norm(dnormed, x_ptr, norm_ptr, residual_ptr, dx_ptr, rows, row_mask, epsilon, S, BLOCK_S)
    tl.store(dnorm_ptr + tl.program_id(0).to(tl.int64) * S + cols, dnorm, mask=col_mask)
