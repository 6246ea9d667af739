"""What touches all parameters of a side layer at once, so that it costs one launch and not six.

cast_parameters                rounds them, in the launch of `_side_qkv_fwd_kernel`
_side_weights_bwd_dw_kernel    their gradients, from what the other backward kernels left
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cast(source_ptr, target_ptr, block, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    where = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + where, tl.load(source_ptr + where, mask=where < SIZE), mask=where < SIZE)


@triton.jit
def cast_parameters(
    attention_norm_ptr, qkv_ptr, attention_out_ptr, mlp_norm_ptr, gate_up_ptr, mlp_out_ptr,
    to_attention_norm_ptr, to_qkv_ptr, to_attention_out_ptr, to_mlp_norm_ptr, to_gate_up_ptr, to_mlp_out_ptr,
    block, S: tl.constexpr, WIDTH: tl.constexpr, MIXED: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round one block of the parameters: gate_up, mlp_out, qkv, attention_out, both norms, then nothing."""
    END_GATE_UP: tl.constexpr = (2 * F * S + BLOCK - 1) // BLOCK
    END_MLP_OUT: tl.constexpr = END_GATE_UP + (S * F + BLOCK - 1) // BLOCK
    END_QKV: tl.constexpr = END_MLP_OUT + (WIDTH * S + BLOCK - 1) // BLOCK
    END_ATTENTION_OUT: tl.constexpr = END_QKV + (S * MIXED + BLOCK - 1) // BLOCK
    END_ATTENTION_NORM: tl.constexpr = END_ATTENTION_OUT + (S + BLOCK - 1) // BLOCK
    if block < END_GATE_UP:
        _cast(gate_up_ptr, to_gate_up_ptr, block, 2 * F * S, BLOCK)
    elif block < END_MLP_OUT:
        _cast(mlp_out_ptr, to_mlp_out_ptr, block - END_GATE_UP, S * F, BLOCK)
    elif block < END_QKV:
        _cast(qkv_ptr, to_qkv_ptr, block - END_MLP_OUT, WIDTH * S, BLOCK)
    elif block < END_ATTENTION_OUT:
        _cast(attention_out_ptr, to_attention_out_ptr, block - END_QKV, S * MIXED, BLOCK)
    elif block < END_ATTENTION_NORM:
        _cast(attention_norm_ptr, to_attention_norm_ptr, block - END_ATTENTION_OUT, S, BLOCK)
    elif block < END_ATTENTION_NORM + (S + BLOCK - 1) // BLOCK:
        _cast(mlp_norm_ptr, to_mlp_norm_ptr, block - END_ATTENTION_NORM, S, BLOCK)


@triton.jit
def _product_over_tokens(
    left_ptr, right_ptr, out_ptr, tile, T,
    M: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of out [M, N] = left^T @ right, left [T, M] and right [T, N]."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    offs_m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows = tl.arange(0, BLOCK_T)
    left_offsets = rows[:, None] * M + offs_m[None, :]
    right_offsets = rows[:, None] * N + offs_n[None, :]
    for t in range(0, T, BLOCK_T):
        inside = (rows < T - t)[:, None]
        # Loaded as it lies in memory and turned for the product: the copy to shared memory stays asynchronous.
        left = tl.load(left_ptr + left_offsets, mask=inside & mask_m[None, :], other=0.0)
        right = tl.load(right_ptr + right_offsets, mask=inside & mask_n[None, :], other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
        # Moving the pointers keeps the offsets in 32 bits, which is what the registers of four loops have room for.
        left_ptr += BLOCK_T * M
        right_ptr += BLOCK_T * N
    where = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _sum_over_blocks(partial_ptr, out_ptr, tile, count, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N entries of out [S], the sum over the rows of partial fp32 [count, S]."""
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for block in range(0, count, BLOCK_T):
        rows = block + tl.arange(0, BLOCK_T)
        mask = (rows < count)[:, None] & (cols < S)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * S + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=cols < S)


@triton.jit(do_not_specialize=["T", "attention_blocks", "mlp_blocks"])
def _side_weights_bwd_dw_kernel(
    dqkv_ptr, normed_s_ptr, du_ptr, mixed_ptr, dgate_up_ptr, normed_u_ptr, dout_ptr, activation_ptr,
    attention_partial_ptr, mlp_partial_ptr,
    dattention_norm_ptr, dqkv_weight_ptr, dattention_out_ptr, dmlp_norm_ptr, dgate_up_weight_ptr, dmlp_out_ptr,
    T, attention_blocks, mlp_blocks,
    S: tl.constexpr, WIDTH: tl.constexpr, MIXED: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """All gradients: tiles of gate_up, mlp_out, qkv and attention_out, then both norms, in this order of programs.

    A tile needs all tokens, so nothing is added across programs.
    """
    COLS_S: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    END_GATE_UP: tl.constexpr = (2 * F + BLOCK_M - 1) // BLOCK_M * COLS_S
    ROWS_S: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    END_MLP_OUT: tl.constexpr = END_GATE_UP + ROWS_S * ((F + BLOCK_N - 1) // BLOCK_N)
    END_QKV: tl.constexpr = END_MLP_OUT + (WIDTH + BLOCK_M - 1) // BLOCK_M * COLS_S
    END_ATTENTION_OUT: tl.constexpr = END_QKV + ROWS_S * ((MIXED + BLOCK_N - 1) // BLOCK_N)
    tile = tl.program_id(0)
    if tile < END_GATE_UP:
        _product_over_tokens(
            dgate_up_ptr, normed_u_ptr, dgate_up_weight_ptr, tile, T, 2 * F, S, BLOCK_M, BLOCK_N, BLOCK_T
        )
    elif tile < END_MLP_OUT:
        tile -= END_GATE_UP
        _product_over_tokens(dout_ptr, activation_ptr, dmlp_out_ptr, tile, T, S, F, BLOCK_M, BLOCK_N, BLOCK_T)
    elif tile < END_QKV:
        tile -= END_MLP_OUT
        _product_over_tokens(dqkv_ptr, normed_s_ptr, dqkv_weight_ptr, tile, T, WIDTH, S, BLOCK_M, BLOCK_N, BLOCK_T)
    elif tile < END_ATTENTION_OUT:
        tile -= END_QKV
        _product_over_tokens(du_ptr, mixed_ptr, dattention_out_ptr, tile, T, S, MIXED, BLOCK_M, BLOCK_N, BLOCK_T)
    elif tile < END_ATTENTION_OUT + COLS_S:
        tile -= END_ATTENTION_OUT
        _sum_over_blocks(attention_partial_ptr, dattention_norm_ptr, tile, attention_blocks, S, BLOCK_T, BLOCK_N)
    else:
        tile -= END_ATTENTION_OUT + COLS_S
        _sum_over_blocks(mlp_partial_ptr, dmlp_norm_ptr, tile, mlp_blocks, S, BLOCK_T, BLOCK_N)
