"""What a kernel reads of an NF4 matrix, as one value inside the package and as a flat list in the ops' schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NF4_SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor codebook, Tensor? absmax_scale, Tensor? absmax_map, Tensor? absmax_offset,"
    " int block_size"
)


class NF4Tensors(NamedTuple):
    """The fields of `NF4Weight` that kernels read, in the order of NF4_SCHEMA."""

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    absmax_scale: Tensor | None
    absmax_map: Tensor | None
    absmax_offset: Tensor | None
    block_size: int
