"""Kernels that no card runs well, or at all, for the test that this is found out. Needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ladder_kernels.gpu.spec import KernelSpec


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x / tl.sum(x))


@triton.jit
def _oversized_kernel(x_ptr, out_ptr, cols, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    row = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in tl.range(0, cols, 128, num_stages=STAGES):
        x = tl.load(x_ptr + row[:, None] * cols + begin + tl.arange(0, 128)[None, :])
        other = tl.load(x_ptr + (row[:, None] + BLOCK) * cols + begin + tl.arange(0, 128)[None, :])
        total = tl.dot(x, other.T, total)
    tl.store(out_ptr + row[:, None] * BLOCK + row[None, :], total)


# 512 values a thread do not fit in its 255 registers.
SPILLING = KernelSpec(
    "spilling", _spilling_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"SIZE": 16384}, num_warps=1
)
# Three of four stages of 64 KiB are in flight.
OVERSIZED = KernelSpec(
    "oversized",
    _oversized_kernel,
    {"x_ptr": "*bf16", "out_ptr": "*fp32", "cols": "i32"},
    {"BLOCK": 128, "STAGES": 4},
    divisible=("cols",),
    num_warps=8,
    num_stages=4,
    uses_tensor_cores=True,
)
