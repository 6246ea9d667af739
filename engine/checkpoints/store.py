"""Checkpoint folders that are whole or not there: staged, hashed, synced, then renamed once.

    <run>/checkpoint-<step>/               files, and manifest.json with the sha256 and size of each
    <run>/.staging-checkpoint-<step>-<pid>/    being written; what a crash leaves is swept
    <run>/.replaced-checkpoint-<step>-<pid>/   the one of the same step before it, until the new one is in place

A folder without a manifest that fits every byte is no checkpoint: resuming passes it over, with the reason. Only files
that the manifest names are ever read. Everything here is names and bytes; what they mean is the trainer's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_MAX_MANIFEST_BYTES = 1 << 22
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STAGING = re.compile(r"\.staging-checkpoint-(\d+)-(\d+)")
_REPLACED = re.compile(r"\.replaced-checkpoint-(\d+)-(\d+)")
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        run: of one training and all that resumes it, so that another one in the same folder is told apart.
        step: optimizer steps done.
        sequence: counts up with every checkpoint that is saved into a folder: what is newest does not depend on clocks,
            nor on steps, which a training that goes back to an older checkpoint takes again.
        settings: what resuming has to have in common with the run that saved.
        files: sha256 and size in bytes by name.
    """

    run: str
    step: int
    sequence: int
    settings: Mapping[str, Any]
    files: Mapping[str, tuple[str, int]]


def staging_folder(run_folder: Path, step: int, pid: int) -> Path:
    """Where the checkpoint of a step is written by a process."""
    return run_folder / f".staging-checkpoint-{step}-{pid}"


def begin(staging: Path) -> None:
    """Make a staging folder, empty."""
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def next_sequence(run_folder: Path) -> int:
    """One more than that of any checkpoint that is there."""
    return 1 + max((manifest.sequence for manifest, _ in _readable(run_folder, [])), default=0)


def commit(staging: Path, run: str, sequence: int, settings: Mapping[str, Any]) -> Path:
    """Hash and sync what is staged, read it back, and put it in place by one rename.

    Returns:
        the checkpoint's folder.

    Raises:
        OSError: nothing was put in place; what was there still is.
        CheckpointError: the same, because it does not read back as it was written.
    """
    match = _STAGING.fullmatch(staging.name)
    if match is None:
        raise ValueError(f"{staging}: expected a staging_folder()")
    step, pid = int(match[1]), match[2]
    files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    content = {
        "format_version": FORMAT_VERSION,
        "run": run,
        "step": step,
        "sequence": sequence,
        "settings": dict(settings),
        "files": {name: dict(zip(("sha256", "size"), _digest(path), strict=True)) for name, path in files.items()},
    }
    (staging / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in (*files.values(), staging / MANIFEST, *_folders(staging)):
        _sync(path)
    final = staging.with_name(f"checkpoint-{step}")
    replaced = staging.with_name(f".replaced-checkpoint-{step}-{pid}")
    verify(staging)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(staging, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def abandon(staging: Path) -> None:
    """Drop what was staged."""
    shutil.rmtree(staging, ignore_errors=True)


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with its manifest.

    Raises:
        CheckpointError: what is missing or different, by name, with both sizes or both hashes.
    """
    manifest = read_manifest(folder)
    for name, (digest, size) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; {MANIFEST} lists it with {size:,} bytes")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size:,} bytes, {MANIFEST} says {size:,}: it was cut off"
            )
        found, _ = _digest(path)
        if found != digest:
            raise CheckpointError(f"{path}: its sha256 is {found[:12]}..., {MANIFEST} says {digest[:12]}...: damaged")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked in itself but not against the files.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_MANIFEST_BYTES:,} bytes")
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished, or is no checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return _checked(path, content)


def _checked(path: Path, content: Any) -> Manifest:
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}")
    types = {"run": str, "step": int, "sequence": int, "settings": dict, "files": dict}
    if content.keys() != {"format_version", *types}:
        raise CheckpointError(f"{path}: expected the keys {sorted(types)}, got {sorted(map(str, content))[:10]}")
    for name, expected in types.items():
        if type(content[name]) is not expected:
            raise CheckpointError(f"{path}: {name} must be of type {expected.__name__}, got {content[name]!r:.40}")
    files = {}
    for name, entry in content["files"].items():
        if not (isinstance(entry, dict) and entry.keys() == {"sha256", "size"}):
            raise CheckpointError(f"{path}: {name!r:.80} must have sha256 and size")
        digest, size = entry["sha256"], entry["size"]
        if not (isinstance(digest, str) and type(size) is int and size >= 0 and _is_inside(name)):
            raise CheckpointError(f"{path}: {name!r:.80} is no file of a checkpoint")
        files[name] = (digest, size)
    return Manifest(content["run"], content["step"], content["sequence"], content["settings"], files)


def _is_inside(name: str) -> bool:
    """Whether a name stays within its folder on every system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & set("\\:\0")


def checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of everything that is named like a checkpoint, by step."""
    if not run_folder.is_dir():
        return []
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in run_folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_valid(run_folder: Path) -> Path:
    """The checkpoint to resume from: of those that are whole the one that was saved last.

    Damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there is none; the message says what is wrong with those that are there.
    """
    faults: list[str] = []
    for _, folder in reversed(_readable(run_folder, faults)):
        try:
            verify(folder)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            logger.warning("passed over: %s", fault)
        return folder
    reasons = "".join(f"\n  {fault}" for fault in faults) or " it holds none"
    raise CheckpointError(f"{run_folder}: no valid checkpoint to resume from:{reasons}")


def of_newest_run(run_folder: Path) -> tuple[str, dict[int, Path]]:
    """The run that saved last into a folder ("" for none), and its checkpoints by step, whole or not."""
    found = _readable(run_folder, [])
    run = found[-1][0].run if found else ""
    own = {folder for manifest, folder in found if manifest.run == run}
    return run, {step: folder for step, folder in checkpoints(run_folder) if folder in own}


def _readable(run_folder: Path, faults: list[str]) -> list[tuple[Manifest, Path]]:
    """Checkpoints with a manifest, in the order they were saved; `faults` gains what is wrong with the others."""
    found = []
    for _, folder in checkpoints(run_folder):
        try:
            found.append((read_manifest(folder), folder))
        except CheckpointError as error:
            faults.append(str(error))
    return sorted(found, key=lambda entry: entry[0].sequence)


def sweep(run_folder: Path) -> None:
    """Remove what crashed saves left, and bring back a checkpoint that was about to be replaced."""
    if not run_folder.is_dir():
        return
    for path in sorted(run_folder.iterdir()):
        replaced, staged = _REPLACED.fullmatch(path.name), _STAGING.fullmatch(path.name)
        match = replaced or staged
        if match is None or not path.is_dir():
            continue
        final = path.with_name(f"checkpoint-{match[1]}")
        if replaced and not final.exists():
            os.rename(path, final)
        elif not _is_running(int(match[2])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # nothing of this process is being written while it sweeps
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def rotate(run_folder: Path, run: str, limit: int, keep: Iterable[Path]) -> None:
    """Delete checkpoints of this run, those saved first, until `limit` are left.

    Those of other runs and folders without a manifest are not touched, nor are the last one and `keep`. Names are given
    up before files are, so that no half of a checkpoint keeps one.
    """
    own = [folder for manifest, folder in _readable(run_folder, []) if manifest.run == run]
    protected = {path.resolve() for path in (*keep, *own[-1:])}
    excess = len(own) - max(limit, 1)
    for folder in [path for path in own if path.resolve() not in protected][: max(excess, 0)]:
        given_up = folder.with_name(f".staging-{folder.name}-{os.getpid()}")
        try:
            os.rename(folder, given_up)
            shutil.rmtree(given_up)
        except OSError as error:
            logger.warning("%s: could not be deleted (%s); training goes on", folder, error)


def _digest(path: Path) -> tuple[str, int]:
    """sha256 and size."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _folders(root: Path) -> Iterator[Path]:
    """Every folder below, then the root itself."""
    yield from sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True)
    yield root


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and orders renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
