"""Softmax cross entropy of a chunk of logits, the gradient written over them; formula in `reference.cross_entropy`.

One thread block per row: a vocabulary of 152k does not fit its registers, so the row is read twice and written once.
The second pass runs backwards, so that it begins with what the first one has left in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.spec import POINTERS, KernelSpec, architectures_of
from ladder_kernels.reference import IGNORE_INDEX

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)


class RowLoop(NamedTuple):
    """How a thread block walks along a row: `lanes` vectors of `vector` neighbours at a time."""

    lanes: int
    vector: int
    num_warps: int
    num_stages: int


def row_loop(vocabulary: int, itemsize: int) -> RowLoop:
    """Whole blocks of threads, 16 bytes each.

    A chunk of the loss has about as many rows as a large card has multiprocessors, so one block should be able to keep
    the memory busy: 512 threads with three loads in flight ask for 24 KiB.
    """
    vector = 16 // itemsize
    lanes = min(512, triton.next_power_of_2(triton.cdiv(vocabulary, vector)))
    return RowLoop(lanes, vector, max(1, lanes // 32), 4)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, losses_ptr, V, NEED_GRAD: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    logits_ptr += row.to(tl.int64) * V
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    dtype = logits_ptr.dtype.element_ty
    if target == _IGNORE_INDEX:
        tl.store(losses_ptr + row, 0.0)
        if NEED_GRAD:
            for begin in range(0, V, LANES * VECTOR):
                zeros = tl.zeros((LANES, VECTOR), dtype)
                tl.store(logits_ptr + begin + columns, zeros, mask=begin + columns < V)
    else:
        # A target outside of the vocabulary makes the loss NaN: raising would need the host to wait.
        is_valid = (target >= 0) & (target < V)
        target_logit = tl.load(logits_ptr + target, mask=is_valid, other=float("nan")).to(tl.float32)
        # Every lane keeps its own maximum, finite even where all it saw is -inf, and the sum relative to it. NaN, inf
        # and a row of nothing but -inf end as a NaN total.
        lane_max = tl.full((LANES,), _LOWEST, tl.float32)
        lane_sum = tl.zeros((LANES,), tl.float32)
        for begin in tl.range(0, V, LANES * VECTOR, num_stages=NUM_STAGES):
            mask = begin + columns < V
            logits = tl.load(logits_ptr + begin + columns, mask=mask, other=float("-inf")).to(tl.float32)
            new_max = tl.maximum(lane_max, tl.max(logits, axis=1))
            lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.sum(tl.exp(logits - new_max[:, None]), axis=1)
            lane_max = new_max
        row_max = tl.max(lane_max, axis=0)
        total = tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0)
        total = tl.where(total > 0, total, float("nan"))
        tl.store(losses_ptr + row, tl.log(total) - (target_logit - row_max))
        if NEED_GRAD:
            inverse = 1.0 / total
            last = (tl.cdiv(V, LANES * VECTOR) - 1) * (LANES * VECTOR)
            for passed in tl.range(0, V, LANES * VECTOR, num_stages=NUM_STAGES):
                begin = last - passed
                mask = begin + columns < V
                logits = tl.load(logits_ptr + begin + columns, mask=mask, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(logits - row_max) * inverse - tl.where(begin + columns == target, 1.0, 0.0)
                tl.store(logits_ptr + begin + columns, gradient.to(dtype), mask=mask)


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, need_grad: bool) -> None:
    """`reference.cross_entropy` of contiguous fp32 or 16-bit logits [R, V] into losses fp32 [R].

    With need_grad the logits become their gradient, otherwise they are left alone. A target that is neither
    IGNORE_INDEX nor in [0, V) makes the loss of its row NaN; its gradient is meaningless.
    """
    rows, vocabulary = logits.shape
    loop = row_loop(vocabulary, logits.itemsize)
    if rows > 0:
        launch(
            _cross_entropy_fwd_kernel, (rows,), logits, targets, losses, vocabulary, NEED_GRAD=need_grad,
            LANES=loop.lanes, VECTOR=loop.vector, NUM_STAGES=loop.num_stages,
            num_warps=loop.num_warps, num_stages=loop.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def specs() -> Iterator[KernelSpec]:
    """Real vocabularies, and one that is smaller than a thread block."""
    for dtype, pointer in POINTERS.items():
        for loop in {row_loop(vocabulary, dtype.itemsize): None for vocabulary in (512, 32000, 152064)}:
            for need_grad in (True, False):
                yield KernelSpec(
                    name=f"linear_cross_entropy._cross_entropy_fwd_kernel.{pointer[1:]}.{loop.lanes}x{loop.vector}"
                    + (".grad" if need_grad else ""),
                    kernel=_cross_entropy_fwd_kernel,
                    types={"logits_ptr": pointer, "targets_ptr": "*i64", "losses_ptr": "*fp32", "V": "i32"},
                    constants={
                        "NEED_GRAD": need_grad,
                        "LANES": loop.lanes,
                        "VECTOR": loop.vector,
                        "NUM_STAGES": loop.num_stages,
                    },
                    divisible=("V",),
                    num_warps=loop.num_warps,
                    num_stages=loop.num_stages,
                    architectures=architectures_of(dtype),
                )
