"""One training at a time in a folder: refused with who is there, free at once when that one ends or is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ladders import ladder_model

from engine import LadderArguments, LadderTrainer
from engine.checkpoints import lock
from engine.checkpoints.lock import LOCK_FILE, FolderInUseError, only_training

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs flock"),
    pytest.mark.usefixtures("one_thread"),
]

ROOT = Path(__file__).parents[1]
# Loads only the module under test: torch would take seconds.
HOLD = f"""
import importlib.util, sys, time, os
spec = importlib.util.spec_from_file_location("lock", {str(ROOT / "engine" / "checkpoints" / "lock.py")!r})
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
with lock.only_training(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        time.sleep(60)
    if sys.argv[2] == "wait":
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def holder(folder: Path, what: str = "wait") -> tuple[subprocess.Popen[str], int]:
    """A process that holds the lock, and the process that said so."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), what], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_another_process_is_refused_with_who_is_there_until_it_dies(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    try:
        with pytest.raises(FolderInUseError, match=rf"writes here \(process {process.pid} on .*since 20"):
            with only_training(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / LOCK_FILE).exists()  # what SIGKILL leaves is a file that nobody has locked
    with only_training(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
    assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_hold_it_on(tmp_path: Path) -> None:
    """Workers of a data loader live some seconds longer than a killed parent."""
    process, child = holder(tmp_path, "fork")
    try:
        process.kill()
        process.wait()
        with only_training(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the file its holder ends: the name then belongs to nobody, or to a third one."""
    stock, calls = lock.fcntl.flock, 0

    def flock(descriptor: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / LOCK_FILE).unlink()
        stock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with only_training(tmp_path):
        assert calls == 2
        process = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path), "wait"], capture_output=True, text=True)
        assert "FolderInUseError" in process.stderr


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_lock_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    open_before = len(os.listdir("/proc/self/fd"))
    with only_training(tmp_path):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be locked" in caplog.text and os.strerror(code) in caplog.text
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_system_without_flock_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with only_training(tmp_path):
        pass
    assert "this system has no flock" in caplog.text


def trainer(folder: Path) -> LadderTrainer:
    rows = [{"input_ids": [1, 2, 3, start], "labels": [1, 2, 3, start]} for start in range(8)]
    arguments = LadderArguments(
        output_dir=str(folder), max_steps=2, save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True
    )
    return LadderTrainer(ladder_model("xladder", reduction_factor=1).train(), arguments, train_dataset=rows)


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    """The second is refused before it touches anything; afterwards it may."""
    process, _ = holder(tmp_path)
    try:
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(FolderInUseError, match="another training writes here"):
            trainer(tmp_path).train()
        assert {path.name for path in tmp_path.iterdir()} == before
    finally:
        process.kill()
        process.wait()
    trainer(tmp_path).train()
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert not (tmp_path / LOCK_FILE).exists()


def test_threads_are_told_apart_and_a_command_may_train_in_the_folder_it_holds(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            trainer(tmp_path).train()
        except FolderInUseError as error:
            refused.append(str(error))

    with only_training(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert trainer(tmp_path).train().global_step == 2
        assert (tmp_path / LOCK_FILE).exists()
    assert len(refused) == 1 and f"process {os.getpid()}" in refused[0]
