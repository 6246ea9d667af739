"""Checkpoint folders under fire: killed at every write, flipped, cut, swapped, rotated, on a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoints import store
from engine.checkpoints.store import MANIFEST, CheckpointError

FILES = {"ladder.safetensors": b"weights " * 100, "optimizer.json": b"{}", "nested/rng.json": b"[1, 2]", "empty": b""}
SETTINGS = {"seed": 1}


def save(run: Path, step: int, name: str = "run", fill: bytes = b"") -> Path:
    staging = store.staging_folder(run, step, os.getpid())
    store.begin(staging)
    for file, content in FILES.items():
        (staging / file).parent.mkdir(exist_ok=True)
        (staging / file).write_bytes(content + fill)
    return store.commit(staging, name, store.next_sequence(run), SETTINGS)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = store.verify(folder)
    assert (folder.name, manifest.step, manifest.run, manifest.settings) == ("checkpoint-7", 7, "run", SETTINGS)
    assert set(manifest.files) == set(FILES) and store.newest_valid(tmp_path) == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7"]


class Events:
    """Calls `action` at the n-th call that changes something on the disk, before it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], None]) -> None:
        self.count = 0
        for owner, name in (
            (os, "rename"),
            (os, "mkdir"),
            (store, "_sync"),
            (store.shutil, "rmtree"),
            (Path, "write_bytes"),
            (Path, "write_text"),
        ):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), at, action))

    def _counted(self, call: Callable[..., object], at: int, action: Callable[[], None]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            self.count += 1
            if self.count == at:
                action()
            return call(*arguments, **options)

        return counted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_killed_at_every_write(tmp_path: Path, again: bool) -> None:
    """SIGKILL before each change on the disk: the old checkpoint or the new one is there in full, and no litter."""
    finished, at = False, 0
    while not finished:
        at += 1
        run = tmp_path / str(at)
        old, new = save(run, 1), 1 if again else 2
        before = contents(old)
        child = os.fork()
        if child == 0:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Events(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                    save(run, new, fill=b"new")
            finally:
                os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        store.sweep(run)
        found = store.newest_valid(run)
        after = {name: content + b"new" for name, content in FILES.items()}
        assert contents(found) == (after if finished else contents(found))
        assert contents(found) in (before, after)
        assert not [path.name for path in run.iterdir() if not path.name.startswith("checkpoint-")]
    assert at > 15


def test_every_flipped_byte_and_every_cut_is_seen(tmp_path: Path) -> None:
    folder, number = save(tmp_path, 3), random.Random(0)
    for name in (*FILES, MANIFEST):
        path = folder / name
        whole = path.read_bytes()
        faults = []
        for _ in range(60 if whole else 0):
            place = number.randrange(len(whole))
            faults.append(whole[:place] + bytes([whole[place] ^ (1 << number.randrange(8))]) + whole[place + 1 :])
        faults += [whole[: number.randrange(len(whole))] for _ in range(20 if whole else 0)] + [whole + b"\0"]
        for fault in faults:
            path.write_bytes(fault)
            try:
                manifest = store.verify(folder)
            except CheckpointError as error:
                assert name in str(error) or name == MANIFEST
                continue
            # A flip in the manifest's own words can be harmless: no byte of what is loaded has changed.
            assert name == MANIFEST and {n: s for n, (_, s) in manifest.files.items()} == {
                n: len(c) for n, c in FILES.items()
            }
        path.write_bytes(whole)
    assert store.verify(folder)
    (folder / "optimizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.json: is missing; manifest\.json lists it with 2 bytes"):
        store.verify(folder)


def test_swapped_files_are_seen(tmp_path: Path) -> None:
    one, other = save(tmp_path, 1), save(tmp_path, 2, fill=b"x")
    name = "ladder.safetensors"
    first, second = (one / name).read_bytes(), (other / name).read_bytes()
    (one / name).write_bytes(second)
    (other / name).write_bytes(first)
    with pytest.raises(
        CheckpointError, match=r"no valid checkpoint to resume from:(?s:.*)checkpoint-2(?s:.*)checkpoint-1"
    ):
        store.newest_valid(tmp_path)


def test_damaged_ones_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3" / "optimizer.json").write_bytes(b"[]")
    (tmp_path / "checkpoint-9").mkdir()
    assert store.newest_valid(tmp_path).name == "checkpoint-2"
    assert "checkpoint-3/optimizer.json" in caplog.text and "checkpoint-9: has no manifest.json" in caplog.text


def test_what_was_saved_last_is_newest(tmp_path: Path) -> None:
    """Whoever goes back to step 1 does not find step 5 again, nor loses what was saved since."""
    for step in (1, 5, 2, 3):
        save(tmp_path, step)
    assert store.newest_valid(tmp_path).name == "checkpoint-3"
    store.rotate(tmp_path, "run", 2, [])
    assert [step for step, _ in store.checkpoints(tmp_path)] == [2, 3]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = contents(save(tmp_path, 1))
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if ".staging" in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        save(tmp_path, 1, fill=b"new")
    assert contents(store.newest_valid(tmp_path)) == old and not list(tmp_path.glob(".replaced*"))


def test_what_does_not_read_back_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = contents(save(tmp_path, 1))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_sync", lambda path: path.is_file() and path.write_bytes(b""))
        with pytest.raises(CheckpointError):
            save(tmp_path, 1, fill=b"new")
    assert contents(store.newest_valid(tmp_path)) == old


def test_the_run_that_saved_last_is_resumed(tmp_path: Path) -> None:
    """A higher step that another training left behind does not win, nor is it deleted."""
    save(tmp_path, 900, "before")
    for step in (10, 20, 30):
        save(tmp_path, step, "now")
    assert store.newest_valid(tmp_path).name == "checkpoint-30"
    store.rotate(tmp_path, "now", 1, [])
    assert [step for step, _ in store.checkpoints(tmp_path)] == [30, 900]


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [10, 50]), (2, [10, 50]), (3, [10, 40, 50]), (9, [10, 20, 30, 40, 50])]
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path, limit: int, kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    store.rotate(tmp_path, "run", limit, [tmp_path / "checkpoint-10"])
    assert [step for step, _ in store.checkpoints(tmp_path)] == kept
    assert not list(tmp_path.glob(".*"))


def test_a_failed_delete_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(store.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(PermissionError("held")))
    store.rotate(tmp_path, "run", 1, [])
    assert "could not be deleted" in caplog.text and store.newest_valid(tmp_path).name == "checkpoint-2"


def test_litter_of_dead_processes_is_swept(tmp_path: Path) -> None:
    dead, alive = store.staging_folder(tmp_path, 5, 2**22 + 1), store.staging_folder(tmp_path, 6, os.getppid())
    for folder in (dead, alive):  # the first above the largest process id
        store.begin(folder)
    folder = save(tmp_path, 4)
    os.rename(folder, tmp_path / f".replaced-checkpoint-4-{2**22 + 1}")
    (tmp_path / ".staging-mine").mkdir()
    store.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", alive.name, ".staging-mine"}
    store.verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format_version": 2}, "format_version must be 1, got 2"),
        (lambda m: [m], "format_version must be 1, got None"),
        (lambda m: m | {"more": 1}, "expected the keys"),
        (lambda m: m | {"step": "7"}, "step must be of type int, got '7'"),
        (lambda m: m | {"files": {"../../etc/passwd": {"sha256": "", "size": 0}}}, "is no file of a checkpoint"),
        (lambda m: m | {"files": {"C:x": {"sha256": "", "size": 0}}}, "is no file of a checkpoint"),
        (lambda m: m | {"files": {"/x": {"sha256": "", "size": 0}}}, "is no file of a checkpoint"),
        (lambda m: m | {"files": {"x": {"sha256": "", "size": -1}}}, "is no file of a checkpoint"),
        (lambda m: m | {"files": {"x": {"size": 1}}}, "must have sha256 and size"),
    ],
)
def test_hostile_manifests(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    path = save(tmp_path, 7) / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        store.verify(path.parent)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '"x"', "\0", " " * (5 << 20)])
def test_manifests_that_are_none(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 7) / MANIFEST
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        store.verify(path.parent)


def test_nothing_to_resume(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        store.sweep(folder)
        with pytest.raises(CheckpointError, match="no valid checkpoint to resume from: it holds none"):
            store.newest_valid(folder)
