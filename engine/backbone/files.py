"""Finding a checkpoint's files: a local folder as it is, or a hub id downloaded to the hub cache.

Config, index and file names are hostile input. Sizes are capped, and every file must lie in the checkpoint's folder or,
for a hub snapshot, in the blob stores of the hub cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from engine.backbone.shards import CheckpointError, StoredTensor, parse_json, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 32 * 2**20
_TEXT_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, with config, index and tokenizer there; weights of a hub id are fetched later.

    Raises:
        CheckpointError: no such folder, or a hub id that cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"no folder {source}: expected a local checkpoint folder or a hub id like owner/name")
    return _download(source, revision, _TEXT_PATTERNS)


def locate_weights(source: str | Path, folder: Path, revision: str | None = None) -> None:
    """Download exactly the shards that the index of a hub snapshot names; nothing for a local folder."""
    if Path(source).expanduser().is_dir():
        return
    names = sorted(set(_weight_map(folder).values())) if (folder / INDEX).exists() else [SINGLE]
    _download(str(source), revision, names)


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repo_id!r} is no local folder and cannot be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).strip()[:300]}). "
            "Give the path of a folder, or go online once to fill the cache."
        ) from error
    return Path(folder).resolve()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object of a file in the folder.

    Raises:
        CheckpointError: missing, outside the folder, larger than `MAX_JSON_BYTES`, or not a JSON object.
    """
    path = checked_path(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{name}: larger than {MAX_JSON_BYTES} bytes, refused")
    return parse_json(path.read_bytes(), name)


def checked_path(folder: Path, name: str) -> Path:
    """folder / name, where name is a plain file name and the file truly lies there.

    Raises:
        CheckpointError: a name with directories, a missing file, or a link that leads elsewhere.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+=@ -]{1,200}", name) or name in (".", ".."):
        raise CheckpointError(f"file name {name!r}: expected a plain name inside {folder}")
    path = folder / name
    target = path.resolve()
    if not target.is_file():
        raise CheckpointError(f"{name}: missing in {folder}")
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        repository = folder.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{name}: links outside {folder}, to {target}; copy the file into the folder")
    return path


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, after all headers were checked.

    Raises:
        CheckpointError: no safetensors, a malformed index, or a shard that is missing, truncated or lacks a tensor.
    """
    if (folder / SINGLE).exists():
        return read_header(checked_path(folder, SINGLE))
    if not (folder / INDEX).exists():
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise CheckpointError(
            f"no {SINGLE} and no {INDEX} in {folder}. Only safetensors are read"
            + (f", not {', '.join(found[:3])}: convert with transformers' save_pretrained" if found else "")
        )
    weight_map = _weight_map(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_header(checked_path(folder, shard)).items():
            if name in tensors:
                raise CheckpointError(f"{tensor.label}: also in {tensors[name].path.name}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{shard}: tensor {name}: named by {INDEX}, but not in this file")
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: expected an object weight_map of tensor to file name")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.+=@-]{1,180}\.safetensors", shard):
            raise CheckpointError(f"{INDEX}: tensor {name}: expected a plain .safetensors file name, got {shard!r}")
    return weight_map
