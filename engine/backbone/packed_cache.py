"""The packed layers of a backbone in a file, to be mapped: loaded without quantizing, and streamed without being held.

The file is safetensors: a uint8 tensor "layers.i" per layer, the buffer of `layout`, beginning at a page, and metadata

    format     "ladder-packed-layers"
    content    JSON: version, fingerprint of the backbone, compute dtype, the distinct layouts, and for every layer its
               layout's number and the sha256 of its buffer
    sha256     of content

A file that is ours but damaged, of another version or of another backbone is built again, with a warning that says why;
any other file is left alone and refused. All hashes are compared before anything is used. It is written under a
temporary name and renamed, so that its name never holds half a file; a process that maps an older one keeps that.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backbone.block import Block
from engine.backbone.layout import PAGE, PackedBlock, describe, from_description, pack, packed_nbytes, views
from engine.backbone.shards import CheckpointError, parse_json, read_header, read_metadata

FORMAT = "ladder-packed-layers"
VERSION = 1


def read_packed_cache(path: Path, fingerprint: str, dtype: torch.dtype) -> list[PackedBlock] | None:
    """The layers of a cache, mapped, after every byte of them was compared with its hash.

    Args:
        fingerprint: of the backbone that they must be packed from.
        dtype: compute dtype that their norms and biases must have.

    Returns:
        None where there is no file, or, with a warning, one that has to be built again.

    Raises:
        CheckpointError: the file is something else.
    """
    if not path.exists():
        return None
    try:
        metadata = read_metadata(path)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"packed_cache {path}: not a packed cache ({error}); delete it or choose another path"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"packed_cache {path}: holds something else, perhaps a checkpoint; delete it or choose another path"
        )
    try:
        return _mapped(path, _content(metadata, fingerprint, dtype))
    except (ValueError, LookupError, TypeError) as error:
        warnings.warn(f"packed_cache {path} is built again: {error}", RuntimeWarning, stacklevel=3)
        return None


def _content(metadata: dict[str, Any], fingerprint: str, dtype: torch.dtype) -> dict[str, Any]:
    """The facts of a cache, if it is undamaged and of this backbone. Raises ValueError otherwise."""
    text = str(metadata.get("content"))
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise ValueError("its header is damaged")
    content = parse_json(text, "content")
    for name, expected in (("version", VERSION), ("fingerprint", fingerprint), ("dtype", str(dtype))):
        if content.get(name) != expected:
            raise ValueError(f"expected {name} {expected}, got {content.get(name)}")
    return content


def _mapped(path: Path, content: dict[str, Any]) -> list[PackedBlock]:
    """The layers as views of the mapped file. Raises ValueError unless all of it is as the header says."""
    stored = read_header(path)
    data = _map(path)
    kinds = [from_description(kind) for kind in content["layouts"]]
    packed = []
    for index, (kind, expected) in enumerate(content["layers"]):
        if (entry := stored.get(f"layers.{index}")) is None or entry.nbytes != packed_nbytes(kinds[kind]):
            raise ValueError(f"layer {index} is missing or has another size than its layout")
        buffer = data[entry.begin : entry.end]
        if _sha256(buffer) != expected:
            raise ValueError(f"the bytes of layer {index} are damaged")
        packed.append(PackedBlock(buffer, views(kinds[kind], buffer)))
    return packed


def _map(path: Path) -> Tensor:
    """The bytes of a file, read-only: Linux refuses writable mappings that are larger than its memory."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


class PackedCacheWriter:
    """Writes a cache layer by layer, in any order; a context, on leaving which nothing temporary is left.

    Raises:
        CheckpointError: the folder cannot be written to, the disk is too small, or a write fails.
    """

    def __init__(self, path: Path, num_layers: int) -> None:
        self._path, self._num_layers = path, num_layers
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._start = 2 * PAGE * (num_layers + 1)  # of data; the header before it is written last, and takes less
        self._position = self._start
        self._kinds: list[str] = []
        self._layers: dict[int, tuple[int, str]] = {}
        self._extents: dict[str, dict[str, Any]] = {}
        with self._explained():
            self._file = open(self._temporary, "wb")

    def __enter__(self) -> PackedCacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of what a full disk could not take
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, index: int, block: Block) -> None:
        """Write one layer, of tensors on any device."""
        buffer, kind = pack(block).buffer, describe(block)
        with self._explained():
            if not self._layers:
                self._check_space(buffer.nbytes * self._num_layers)
                self._file.seek(self._start)
            self._file.write(memoryview(buffer.numpy()))
        if kind not in self._kinds:
            self._kinds.append(kind)
        self._layers[index] = (self._kinds.index(kind), _sha256(buffer))
        begin = self._position - self._start
        self._extents[f"layers.{index}"] = {
            "dtype": "U8",
            "shape": [buffer.nbytes],
            "data_offsets": [begin, begin + buffer.nbytes],
        }
        self._position += buffer.nbytes

    def commit(self, fingerprint: str, dtype: torch.dtype) -> None:
        """Complete the file and give it its name."""
        content = json.dumps(
            {
                "version": VERSION,
                "fingerprint": fingerprint,
                "dtype": str(dtype),
                "layouts": [json.loads(kind) for kind in self._kinds],
                "layers": [self._layers[index] for index in range(self._num_layers)],
            },
            separators=(",", ":"),
        )
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        metadata = {"format": FORMAT, "content": content, "sha256": sha256}
        length = self._start - 8
        header = json.dumps({"__metadata__": metadata} | self._extents, separators=(",", ":")).encode().ljust(length)
        if len(header) > length:
            raise CheckpointError(
                f"packed_cache {self._path}: {len(self._kinds)} different layouts need a larger header"
            )
        with self._explained():
            self._file.seek(0)
            self._file.write(length.to_bytes(8, "little") + header)
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._path)
            _sync_folder(self._path.parent)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._path.parent).free
        if needed > free:
            raise CheckpointError(
                f"packed_cache {self._path}: needs {needed / 1e9:.2f} GB on a disk with {free / 1e9:.2f} GB free"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the file system as errors about the cache."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"packed_cache {self._path}: cannot be written ({error}); choose a path in a folder that exists, can "
                "be written to, and has room for the packed layers"
            ) from error


def _sha256(buffer: Tensor) -> str:
    return hashlib.sha256(memoryview(buffer.numpy())).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be opened for that (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
