"""Device functions that more than one kernel uses: formulas, each with its rounding, and the product of two matrices.

16-bit intermediates are rounded where plain torch and transformers round them; everything else stays in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ladder_kernels.reference import ABSMAX_BLOCK

_ABSMAX_BLOCK = tl.constexpr(ABSMAX_BLOCK)


@triton.jit
def nested_absmax(code, scale, map_ptr, offset):
    """map[code] * scale + offset: a scale of double quantization.

    The product is rounded before the sum only if the kernel is launched with enable_fp_fusion=False; an FMA changes a
    fifth of the decoded fp32 weights by an ulp.
    """
    return tl.load(map_ptr + code.to(tl.int32)) * scale + offset


@triton.jit
def load_absmax(absmax_ptr, scale_ptr, map_ptr, offset_ptr, first_block, block, mask, NESTED: tl.constexpr):
    """Scales of NF4 blocks first_block + block: uint64 scalar and uint32 tensor, so that lanes compute in 32 bits."""
    absmax = tl.load(absmax_ptr + first_block + block, mask=mask, other=0)
    if NESTED:
        group = (first_block % _ABSMAX_BLOCK).to(tl.uint32) + block
        scale = tl.load(scale_ptr + first_block // _ABSMAX_BLOCK + group // _ABSMAX_BLOCK, mask=mask, other=0.0)
        absmax = nested_absmax(absmax, scale, map_ptr, tl.load(offset_ptr))
    return absmax


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 values as DTYPE would hold them."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def silu_times(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up of fp32 values that DTYPE can hold, silu rounded before the product."""
    return (rounded(gate / (1.0 + tl.exp(-gate)), DTYPE) * up).to(DTYPE)


@triton.jit
def inverse_rms(x, width, epsilon):
    """1 / sqrt(mean(x^2) + epsilon) of whole rows of fp32 [.., >= width], zero beyond their width."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / width + epsilon)


@triton.jit
def normed_rows(x, inverse, norm):
    """norm * (x * inverse) in x's dtype, the inner product rounded to it before the outer one."""
    return (rounded(x.to(tl.float32) * inverse[:, None], x.dtype) * norm.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def load_angles(cos_ptr, sin_ptr, where, mask, half):
    """cos and sin of the first, then of the second halves of heads, `half` apart in a table; no turn off the mask."""
    cos_a = tl.load(cos_ptr + where, mask=mask, other=1.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + where, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + where + half, mask=mask, other=1.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + where + half, mask=mask, other=0.0).to(tl.float32)
    return cos_a, sin_a, cos_b, sin_b


@triton.jit
def turned(a, b, angles, DTYPE: tl.constexpr):
    """Halves a and b of heads rotated, fp32, the products rounded before their sum."""
    cos_a, sin_a, cos_b, sin_b = angles
    turned_a = rounded(a * cos_a, DTYPE) - rounded(b * sin_a, DTYPE)
    return turned_a, rounded(b * cos_b, DTYPE) + rounded(a * sin_b, DTYPE)


@triton.jit
def row_products(
    x_ptr, weight_ptr, rows, row_mask, cols, col_mask, K: tl.constexpr, K_STRIDE: tl.constexpr, N_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of x [.., K] times columns of a weight [K, ..] with these strides: fp32 [BLOCK_M, BLOCK_N]."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < K
        x = tl.load(x_ptr + rows[:, None] * K + depth[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = weight_ptr + depth[:, None] * K_STRIDE + cols[None, :] * N_STRIDE
        total = tl.dot(x, tl.load(weight, mask=weight_mask, other=0.0), total, input_precision="ieee")
    return total
