"""Device functions that more than one kernel uses."""

from __future__ import annotations

import triton
import triton.language as tl

from ladder_kernels.reference import ABSMAX_BLOCK

_ABSMAX_BLOCK = tl.constexpr(ABSMAX_BLOCK)


@triton.jit
def load_absmax(absmax_ptr, scale_ptr, map_ptr, offset_ptr, first_block, block, mask, NESTED: tl.constexpr):
    """Scales of NF4 blocks first_block + block: uint64 scalar and uint32 tensor, so that lanes compute in 32 bits.

    With NESTED, map[absmax] * scale[block // 256] + offset. The product is rounded before the sum only if the kernel is
    launched with enable_fp_fusion=False; an FMA changes a fifth of the decoded fp32 weights by an ulp.
    """
    absmax = tl.load(absmax_ptr + first_block + block, mask=mask, other=0)
    if NESTED:
        group = (first_block % _ABSMAX_BLOCK).to(tl.uint32) + block
        scale = tl.load(scale_ptr + first_block // _ABSMAX_BLOCK + group // _ABSMAX_BLOCK, mask=mask, other=0.0)
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    return absmax
