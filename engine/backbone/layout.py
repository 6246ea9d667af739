"""A decoder block as one buffer, so that a single copy moves all of it: codes, scales, norms and biases.

The tensors lie in the order of `Block.map`, each at a multiple of `ALIGNMENT` bytes. A buffer is as many whole pages,
so that buffers can be mapped from a file and pinned one by one.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.backbone.block import Block, Linear
from ladder_kernels import NF4Weight

ALIGNMENT = 256
"""Bytes; what CUDA's own allocations have at least, so that no kernel sees a difference."""

PAGE = 4096


class PackedBlock(NamedTuple):
    """A block whose tensors are views into one uint8 buffer."""

    buffer: Tensor
    block: Block


def round_up(nbytes: int, multiple: int) -> int:
    """The smallest multiple that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


def packed_nbytes(block: Block) -> int:
    """Bytes of the buffer that holds the block."""
    return round_up(sum(round_up(tensor.nbytes, ALIGNMENT) for tensor in block.tensors()), PAGE)


def views(block: Block, buffer: Tensor) -> Block:
    """A block of the same shapes and dtypes whose tensors lie in `buffer`, uint8 [at least `packed_nbytes`]."""
    position = 0

    def take(tensor: Tensor) -> Tensor:
        nonlocal position
        begin, position = position, position + round_up(tensor.nbytes, ALIGNMENT)
        return buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return block.map(take)


def pack(block: Block) -> PackedBlock:
    """A copy of the block in one buffer of host memory.

    The memory is mapped for it alone: it starts at a page, leaves no hole in the heap when it goes, and is not rounded
    up to a power of two, as torch does with the memory that it pins (pytorch issue 95823). It is shared between
    processes, as mmap's is by default: Linux copies private pages that are pinned into every forked data worker.
    """
    buffer = torch.frombuffer(mmap.mmap(-1, packed_nbytes(block)), dtype=torch.uint8)
    packed = views(block, buffer)
    for target, source in zip(packed.tensors(), block.tensors(), strict=True):
        target.copy_(source)
    return PackedBlock(buffer, packed)


def describe(block: Block) -> str:
    """Shapes, dtypes and formats of a block as JSON: equal for blocks that are laid out alike."""
    return json.dumps(_encode(block), separators=(",", ":"))


def from_description(content: Any) -> Block:
    """The block that `describe` described, from the parsed JSON, with tensors on the meta device.

    Raises:
        ValueError: not such a description.
    """
    try:
        entries = {
            field.name: _linear(value) if isinstance(value, dict) and "weight" in value else _decode(value)
            for field in fields(Block)
            for value in (content[field.name],)
        }
        return Block(**entries)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not the description of a block: {type(error).__name__}: {error}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": _name(value.dtype)}
    if isinstance(value, Block | Linear | NF4Weight):
        return {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
    return _name(value) if isinstance(value, torch.dtype) else value


def _decode(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return torch.empty(value["tensor"], dtype=getattr(torch, value["dtype"]), device="meta")


def _linear(value: Mapping[str, Any]) -> Linear:
    weight = value["weight"]
    if "packed" not in weight:
        return Linear(_decode(weight), _decode(value["bias"]))
    entries = {name: _decode(entry) for name, entry in weight.items()}
    entries |= {"shape": tuple(weight["shape"]), "dtype": getattr(torch, weight["dtype"])}
    return Linear(NF4Weight(**entries), _decode(value["bias"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
