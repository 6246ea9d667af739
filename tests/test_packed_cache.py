"""The packed cache: built once, mapped afterwards, and never half-used, whatever happens to the file."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ladders import batch, checkpoint_folder, tiny_backbone
from safetensors import safe_open
from torch import Tensor

from engine.backbone import Backbone, load_backbone, loader, packed_cache
from engine.backbone.shards import CheckpointError
from engine.sequence import SequenceLayout


def load(path: Path, family: str = "qwen2", **options: Any) -> Backbone:
    arguments = {"dtype": torch.float32, "residency": "host", "packed_cache": path} | options
    return load_backbone(checkpoint_folder(family), **arguments)


def last_state(backbone: Backbone) -> Tensor:
    *_, (_, hidden) = backbone.hidden_states(batch(9), SequenceLayout.packed([9]))
    return hidden


def assert_right(backbone: Backbone) -> None:
    expected = tiny_backbone()
    assert backbone.fingerprint() == expected.fingerprint()
    assert torch.equal(last_state(backbone), last_state(expected))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "layers.cache"
    load(path)
    return path


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return shutil.copy(original, tmp_path / "layers.cache")


@contextmanager
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Layers that are packed inside the context."""
    added: list[int] = []
    real = packed_cache.PackedCacheWriter.add

    def add(self: Any, index: int, block: Any) -> None:
        added.append(index)
        real(self, index, block)

    with monkeypatch.context() as patch:
        patch.setattr(packed_cache.PackedCacheWriter, "add", add)
        yield added


@pytest.mark.parametrize("options", [{}, {"residency": "device"}, {"prefetch": 2}], ids=str)
def test_the_second_load_does_not_quantize(
    cache: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    tiny_backbone()
    monkeypatch.setattr(loader, "quantize_nf4", lambda *a, **k: pytest.fail("quantized again"))
    assert_right(load(cache, **options))


def test_the_first_load_computes_with_the_file(tmp_path: Path) -> None:
    assert_right(load(tmp_path / "layers.cache"))
    assert [path.name for path in tmp_path.iterdir()] == ["layers.cache"]


def test_other_families_and_formats(tmp_path: Path) -> None:
    for family, options in (("qwen3", {"quantize": False}), ("llama_bias", {"double_quant": False})):
        expected = load_backbone(checkpoint_folder(family), dtype=torch.float32, **options)
        for _ in range(2):
            backbone = load(tmp_path / family, family, **options)
            assert torch.equal(last_state(backbone), last_state(expected))


def test_safetensors_reads_the_file(cache: Path) -> None:
    with safe_open(cache, framework="pt") as file:
        assert sorted(file.keys()) == [f"layers.{index}" for index in range(4)]
        assert file.metadata()["format"] == "ladder-packed-layers"
        layers = load(cache).layers
        assert all(torch.equal(file.get_tensor(f"layers.{index}"), layers._buffers[index]) for index in range(4))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mappings of the process from /proc")
def test_the_file_is_mapped_read_only(cache: Path) -> None:
    backbone = load(cache)
    mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache) in line]
    assert backbone and [line.split()[1] for line in mappings] == ["r--s"]


def test_mapped_layers_survive_a_new_cache_under_the_same_name(cache: Path) -> None:
    backbone = load(cache)
    with pytest.warns(RuntimeWarning, match="is built again"):
        load(cache, double_quant=False)
    assert_right(backbone)


def flip(position: float, bit: int = 0) -> Any:
    """Damage one byte: of the file from its end if negative, at a fraction of it below 1, else at that offset."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * len(data)) if 0 < position < 1 else int(position)] ^= 1 << bit
        path.write_bytes(data)

    return damage


def cut(count: int) -> Any:
    def damage(path: Path) -> None:
        os.truncate(path, path.stat().st_size + count if count < 0 else count)

    return damage


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGES = {
    "version": (lambda path: edit(path, b'\\"version\\":1', b'\\"version\\":2'), "header is damaged"),
    "digest": (lambda path: edit(path, b'"sha256":"', b'"sha256":"0'), "header is damaged"),
    "first layer": (flip(0.25), "bytes of layer . are damaged"),
    "middle": (flip(0.5, 7), "bytes of layer . are damaged"),
    "padding": (flip(-1, 3), "bytes of layer . are damaged"),
    "truncated by a byte": (cut(-1), "truncated"),
    "truncated by a layer": (cut(-30_000), "truncated"),
    "longer": (append, "trailing bytes"),
}


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replace text of the header, whose length stays."""
    data = path.read_bytes()
    assert data.count(old) == 1
    excess = len(new) - len(old)
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data.replace(old, new)[: start + excess].rstrip(b" ").ljust(start) + data[start:])


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(cache)
    with built(monkeypatch) as added, pytest.warns(RuntimeWarning, match=f"layers.cache is built again: .*{reason}"):
        assert_right(load(cache))
    assert sorted(added) == [0, 1, 2, 3]
    with built(monkeypatch) as added:
        assert_right(load(cache))
    assert not added


def test_no_flipped_byte_goes_unseen(cache: Path) -> None:
    """In the header, whose blank end alone may change without consequence, and the layers."""
    data = cache.read_bytes()
    generator = torch.Generator().manual_seed(0)
    used = len(data[: 8 + int.from_bytes(data[:8], "little")].rstrip(b" "))
    offsets = torch.randint(0, used, (40,), generator=generator).tolist()
    offsets += torch.randint(len(data) // 4, len(data), (10,), generator=generator).tolist()
    identity = (tiny_backbone().fingerprint(), torch.float32)
    for offset in offsets:
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        cache.write_bytes(changed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                assert packed_cache.read_packed_cache(cache, *identity) is None, offset
                assert "is built again" in str(caught[-1].message)
            except CheckpointError as error:  # no header to be read
                assert "delete it or choose another path" in str(error)


def test_another_version_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layers.cache"
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "VERSION", 0)
        load(path)
    with pytest.warns(RuntimeWarning, match="is built again: expected version 1, got 0"):
        assert_right(load(path))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3", {}, "expected fingerprint [0-9a-f]{64}, got"),
        ("qwen2", {"double_quant": False}, "expected fingerprint"),
        ("qwen2", {"dtype": torch.bfloat16}, "expected dtype torch.bfloat16, got torch.float32"),
    ],
)
def test_the_cache_of_another_backbone_is_built_again(
    cache: Path, family: str, options: dict[str, Any], reason: str
) -> None:
    expected = load_backbone(checkpoint_folder(family), **({"dtype": torch.float32} | options))
    with pytest.warns(RuntimeWarning, match=f"is built again: {reason}"):
        backbone = load(cache, family, **options)
    assert backbone.fingerprint() == expected.fingerprint()
    assert torch.equal(last_state(backbone), last_state(expected))


@pytest.mark.parametrize("kind", ["empty", "text", "checkpoint", "folder"])
def test_something_else_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "checkpoint":
        shutil.copy(checkpoint_folder() / "model.safetensors", path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"my only copy of the thesis")
    before = None if kind == "folder" else path.read_bytes()
    with pytest.raises(CheckpointError, match=f"packed_cache {path}: (not a packed cache|holds something else)"):
        load(path)
    assert path.is_dir() if before is None else path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# ---- faults of the file system


def assert_refused_without_a_trace(path: Path, message: str, before: list[str]) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == before


@pytest.mark.parametrize("limit", [0, 45_000, 100_001, 150_000])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, limit: int) -> None:
    tiny_backbone()  # writes its checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert_refused_without_a_trace(tmp_path / "layers.cache", "cannot be written .*File too large", [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_right(load(tmp_path / "layers.cache"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_failure_at_the_end_leaves_what_was_there(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, stale: bool
) -> None:
    path = tmp_path / "layers.cache"
    if stale:
        shutil.copy(original, path)
        flip(0.5)(path)
    before = path.read_bytes() if stale else None

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if stale:
            with pytest.warns(RuntimeWarning, match="is built again"):
                assert_refused_without_a_trace(path, "cannot be written .*No space left", ["layers.cache"])
        else:
            assert_refused_without_a_trace(path, "cannot be written .*No space left", [])
    assert before is None or path.read_bytes() == before


def test_a_disk_too_small_is_found_at_the_first_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with built(monkeypatch) as added:
        assert_refused_without_a_trace(tmp_path / "layers.cache", r"needs 0\.00 GB on a disk with 0\.00 GB free", [])
    assert len(added) == 1


def test_a_folder_that_cannot_be_written_to_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_load_all", lambda *_: pytest.fail("loaded although the cache cannot be written"))
    with pytest.raises(CheckpointError, match=r"cannot be written .*No such file.*in a folder that exists"):
        load(tmp_path / "missing" / "layers.cache")

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(packed_cache, "open", refuse, raising=False)
    assert_refused_without_a_trace(tmp_path / "layers.cache", "cannot be written .*Read-only file system", [])


def test_a_crash_between_write_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layers.cache"

    def crash(temporary: Path, _: Path) -> None:
        shutil.copy(temporary, tmp_path / "left behind")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        load(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["left behind"]
    os.rename(tmp_path / "left behind", tmp_path / f".{path.name}.{os.getpid()}.tmp")  # had the process been killed
    with built(monkeypatch) as added:
        assert_right(load(path))
    assert len(added) == 4 and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_cache_that_reads_back_wrong_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(temporary: Path, path: Path) -> None:
        flip(0.5)(temporary)
        real(temporary, path)

    monkeypatch.setattr(os, "replace", replace)
    with (
        pytest.warns(RuntimeWarning, match="layer . are damaged"),
        pytest.raises(CheckpointError, match="not read back"),
    ):
        load(tmp_path / "layers.cache")
