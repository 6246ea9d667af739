"""A gather of rows that the GPU reads from pinned host memory, or from its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladder_kernels.gpu.launcher import launch
from ladder_kernels.gpu.spec import ARCHITECTURES, POINTERS, TURING, KernelSpec

_BLOCK_D = 1024
_NUM_WARPS = 4


@triton.jit
def _gather_rows_fwd_kernel(ids_ptr, table_ptr, out_ptr, V, D, BLOCK_D: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(ids_ptr + token)
    # No row but NaN: an address beyond the table may be any memory of the host.
    is_known = (row >= 0) & (row < V)
    values = tl.load(table_ptr + row * D + columns, mask=is_known & (columns < D), other=float("nan"))
    tl.store(out_ptr + token * D + columns, values, mask=columns < D)


def gather_rows(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids] on the device of the ids, int64 [T]; table [V, D] contiguous, readable by the device."""
    tokens, (vocabulary, width) = ids.shape[0], table.shape
    out = torch.empty(tokens, width, dtype=table.dtype, device=ids.device)
    if out.numel() > 0:
        grid = (tokens, triton.cdiv(width, _BLOCK_D))
        options = {"BLOCK_D": _BLOCK_D, "num_warps": _NUM_WARPS}
        launch(_gather_rows_fwd_kernel, grid, ids.contiguous(), table, out, vocabulary, width, **options)
    return out


def specs() -> Iterator[KernelSpec]:
    """One configuration for every width."""
    for dtype, pointer in POINTERS.items():
        yield KernelSpec(
            name=f"embedding_rows._gather_rows_fwd_kernel.{pointer[1:]}.{_BLOCK_D}",
            kernel=_gather_rows_fwd_kernel,
            types={"ids_ptr": "*i64", "table_ptr": pointer, "out_ptr": pointer, "V": "i32", "D": "i32"},
            constants={"BLOCK_D": _BLOCK_D},
            divisible=("D",),
            num_warps=_NUM_WARPS,
            architectures=ARCHITECTURES if dtype == torch.bfloat16 else (TURING, *ARCHITECTURES),
        )
