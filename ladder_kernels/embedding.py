"""Rows of an embedding, which may stay in host memory: out[t] = table[ids[t]].

A 7B model's embedding is 1.1 GB, of which a pass of 2,048 tokens needs 15 MB. From pinned memory a GPU gathers these by
itself, over PCIe: nothing waits for the ids, and a CUDA graph can hold it. From pageable memory the ids are copied to
the host and the rows back, which waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ladder_kernels.checks import check_dtype, check_shape
from ladder_kernels.dispatch import runs_eagerly, uses_triton


def embedding_rows(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids] on the device of the ids; without gradients.

    Args:
        ids: int64 [T], in [0, V). A GPU that gathers from pinned memory makes other rows NaN, since nobody waits to
            find out.
        table: [V, D], contiguous, on the same device or in host memory.

    Returns:
        [T, D] in table.dtype.

    Raises:
        ValueError, TypeError: shapes or dtypes disagree.
        IndexError: an id outside of [0, V), where the table is on a CPU and gathered by it.
    """
    check_shape("embedding_rows", "ids", ids, ("T",))
    check_dtype("embedding_rows", "ids", ids.dtype, (torch.int64,))
    check_shape("embedding_rows", "table", table, ("V", "D"))
    if ids.device == table.device:
        return F.embedding(ids, table)
    if uses_triton(ids) and runs_eagerly(ids, table) and table.is_pinned() and table.is_contiguous():
        from ladder_kernels.gpu.embedding import gather_rows

        return gather_rows(ids, table)
    return F.embedding(ids.to(table.device), table).to(ids.device, non_blocking=True)
