"""Reading safetensors shards: header checked in full first, then one tensor at a time with plain reads.

Tensors of a checkpoint are read into memory of their own, never mapped: mapped pages count as resident memory of the
process, and a file cut short while mapped kills it. Format: 8 bytes little-endian header length, JSON header, data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names the file and, where there is one, the tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes [begin, end) of `path`."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def label(self) -> str:
        """File and tensor for error messages."""
        return f"{self.path.name}: tensor {self.name}"

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def read(self, scratch: Tensor | None = None) -> Tensor:
        """The tensor on the CPU, in fresh memory, or as a view of `scratch` (uint8, at least `nbytes` long).

        Raises:
            CheckpointError: the file ends early, because it changed since its header was read.
        """
        data = torch.empty(self.nbytes, dtype=torch.uint8) if scratch is None else scratch[: self.nbytes]
        self._read_into(data, self.begin)
        return data.view(self.dtype).reshape(self.shape)

    def read_span(self, first: int, last: int) -> Tensor:
        """Elements [first, last) of the flattened tensor, on the CPU. Raises as `read`."""
        data = torch.empty((last - first) * self.dtype.itemsize, dtype=torch.uint8)
        self._read_into(data, self.begin + first * self.dtype.itemsize)
        return data.view(self.dtype)

    def _read_into(self, data: Tensor, begin: int) -> None:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(begin)
            view, done = memoryview(data.numpy()), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.label}: file ends {len(view) - done} bytes early")
                done += count


def parse_json(data: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in data.

    Raises:
        CheckpointError: not a JSON object, or nested too deep.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: expected valid JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a shard by name, their extents checked against each other and the file's size.

    Raises:
        CheckpointError: a truncated file, or a header that is not well-formed safetensors.
    """
    size = path.stat().st_size
    header, start = _json_header(path)
    header.pop("__metadata__", None)
    tensors = [_stored_tensor(path, name, entry, start) for name, entry in header.items()]
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise CheckpointError(f"{tensor.label}: expected to begin at byte {position}, header says {tensor.begin}")
        position = tensor.end
    if position != size:
        wrong = "truncated" if position > size else "has trailing bytes"
        raise CheckpointError(f"{path.name}: {wrong}: its header describes {position} bytes, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, Any]:
    """The free-form text entries of a shard's header.

    Raises:
        CheckpointError: no header, or one that is not well-formed.
    """
    metadata = _json_header(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the byte where data begins."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path.name}: not a complete safetensors file: its header needs {length} bytes, the file has {size} "
                "(was the download cut off?)"
            )
        return parse_json(file.read(length), f"{path.name}: header"), 8 + length


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    label = f"{path.name}: tensor {name}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _is_size_list(shape) or not _is_size_list(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{label}: malformed header entry {str(entry)[:200]}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{label}: unsupported dtype {dtype!r}; readable are {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{label}: shape {shape} of {dtype} takes {expected} bytes, header gives {offsets[1] - offsets[0]}"
        )
    return StoredTensor(path, name, DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
