"""Finding and checking a checkpoint's files: index, shard headers, links, hub; nothing here gets as far as weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.backbone import files, load_backbone
from engine.backbone.shards import CheckpointError, read_header

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("originals")
    return {
        "llama2": tiny_checkpoint(base, "llama2", num_hidden_layers=2),
        "sharded": tiny_checkpoint(base, "llama2", num_hidden_layers=2, max_shard_size="60KB"),
    }


@pytest.fixture
def checkpoint(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of a named checkpoint, free to be damaged."""
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


def test_only_safetensors_are_read(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama2")
    (folder / SHARD).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Only safetensors are read, not pytorch_model.bin: convert"):
        load_backbone(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_shard_is_named(checkpoint: Callable[[str], Path], keep: int) -> None:
    folder = checkpoint("sharded")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{victim.name}: (truncated|not a complete safetensors file)"):
        load_backbone(folder)


def test_trailing_bytes_and_missing_shards_are_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("sharded")
    victim = sorted(folder.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content + b"\0" * 5)
    with pytest.raises(CheckpointError, match=rf"{victim.name}: has trailing bytes"):
        load_backbone(folder)
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{victim.name}: missing in"):
        load_backbone(folder)


def test_a_file_cut_while_loading_is_named(originals: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(originals["llama2"] / SHARD, tmp_path))
    stored = read_header(path)[QUERY]
    os.truncate(path, stored.end - 10)
    with pytest.raises(CheckpointError, match=rf"tensor {QUERY}: file ends 10 bytes early"):
        stored.read()


def _index(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= changes.pop("weight_map", {})
        (folder / INDEX).write_text(json.dumps(index | changes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_index(weight_map={QUERY: "../model.safetensors"}), rf"{QUERY}: expected a plain .safetensors file name"),
        (_index(weight_map={QUERY: "/etc/x.safetensors"}), rf"{QUERY}: expected a plain .safetensors file name"),
        (_index(weight_map={QUERY: "a\\b.safetensors"}), rf"{QUERY}: expected a plain .safetensors file name"),
        (_index(weight_map={QUERY: "c:x.safetensors"}), rf"{QUERY}: expected a plain .safetensors file name"),
        (_index(weight_map={QUERY: "pytorch_model.bin"}), rf"{QUERY}: expected a plain .safetensors file name"),
        (_index(weight_map={QUERY: 3}), rf"{QUERY}: expected a plain .safetensors file name, got 3"),
        (
            _index(weight_map={"other": "model-00001-of-00009.safetensors"}),
            "tensor other: named by .*, but not in this",
        ),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), "expected an object weight_map"),
        (lambda folder: (folder / INDEX).write_text("[1]"), f"{INDEX}: expected a JSON object, got list"),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX}: expected valid JSON"),
        (lambda folder: (folder / INDEX).write_text("[" * 10**6), f"{INDEX}: expected valid JSON, got RecursionError"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), f"{INDEX}: expected valid JSON"),
        (
            lambda folder: os.truncate(folder / INDEX, files.MAX_JSON_BYTES + 1),
            f"{INDEX}: larger than .* bytes, refused",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing in"),
    ],
)
def test_bad_indexes_are_named(checkpoint: Callable[[str], Path], change: Callable[[Path], None], message: str) -> None:
    folder = checkpoint("sharded")
    first = sorted(folder.glob("*.safetensors"))[0]
    message = message.replace("model-00001-of-00009.safetensors", first.name)
    change(folder)
    if "named by" in message:
        _index(weight_map={"other": first.name})(folder)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(folder)


def test_links_may_lead_into_the_hub_cache_only(originals: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    shared = tmp_path / "hub" / "blobs" / "12"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for path in originals["llama2"].iterdir():
        store = shared if path.name == SHARD else blobs
        shutil.copy(path, store / f"{path.name}-blob")
        (snapshot / path.name).symlink_to(store / f"{path.name}-blob")
    assert load_backbone(snapshot).fingerprint() == load_backbone(originals["llama2"]).fingerprint()
    outside = shutil.copy(originals["llama2"] / SHARD, tmp_path / "elsewhere")
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: links outside"):
        load_backbone(snapshot)


def _write_header(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"\0" * 16) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def _entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _entry(0, 16, [4]), "b": _entry(8, 16, [2])}, "tensor b: expected to begin at byte"),
        ({"a": _entry(0, 8, [2]), "b": _entry(12, 16, [1])}, "tensor b: expected to begin at byte"),
        ({"a": _entry(0, 16, [5])}, r"tensor a: shape \[5\] of F32 takes 20 bytes, header gives 16"),
        ({"a": _entry(0, 16, [10**30, 0, 4])}, "tensor a: .*takes 0 bytes, header gives 16"),
        ({"a": _entry(0, 16, [-4, -1])}, "tensor a: malformed header entry"),
        ({"a": _entry(-8, 8, [4])}, "tensor a: malformed header entry"),
        ({"a": _entry(0, 16, [4], "F8_E4M3")}, "tensor a: unsupported dtype 'F8_E4M3'; readable are"),
        ({"a": "x"}, "tensor a: malformed header entry"),
        ({"a": _entry(0, 12, [3])}, "has trailing bytes"),
        ({"a": _entry(0, 20, [5])}, "truncated"),
        (b"[]", "header: expected a JSON object"),
        (b"{", "header: expected valid JSON"),
        (b"[" * 200_000, "header: expected valid JSON"),
    ],
)
def test_malformed_headers_are_named(tmp_path: Path, header: Mapping[str, Any] | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{message}|x\.safetensors: {message}"):
        read_header(_write_header(tmp_path / "x.safetensors", header))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damaged_header_is_read_as_saved_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.int64)}, path)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        stored = read_header(path)
    except CheckpointError as error:
        assert path.name in str(error)
        return
    for tensor in stored.values():
        assert tensor.read().shape == tensor.shape


@pytest.mark.parametrize("source", ["./no/such/folder", "/nowhere/at/all", "a/b/c", "", Path("relative")])
def test_a_missing_folder_is_named(source: str | Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*: expected a local checkpoint folder or a hub id"):
        load_backbone(source or "no such/folder")


def test_an_unreachable_hub_id_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no local folder and cannot be downloaded"):
        load_backbone("nobody/nothing")


def test_a_hub_download_takes_text_first_then_only_the_named_shards(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (repo_id, revision, ignore_patterns) == ("owner/name", "v1", ["*/*"])
        asked.append(allow_patterns)
        return str(originals["sharded"])

    monkeypatch.setattr(files, "snapshot_download", download)
    backbone = load_backbone("owner/name", revision="v1")
    assert backbone.source == "owner/name" and backbone.folder == originals["sharded"].resolve()
    text, shards = asked
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in text)
    assert shards == sorted(path.name for path in originals["sharded"].glob("*.safetensors"))
