"""One training at a time in an output folder: two would rotate, resume and overwrite each other's checkpoints.

The lock is the operating system's (flock) on a file in the folder. It ends with the process that holds it, however that
dies, so nothing is ever left to be cleared by hand. Between machines it holds as far as the file system carries it,
which network file systems may not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "_training.lock"
"""The underscore keeps it out of what the Trainer uploads."""

_MAX_OWNER_BYTES = 500


class FolderInUseError(ValueError):
    """Another training writes into the folder; the message says which."""


class _Held(threading.local):
    """Folders that this thread has locked: a command that has locked one may train in it."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()


_held = _Held()
_open: set[int] = set()


@contextlib.contextmanager
def only_training(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made if it is missing.

    Where the file system cannot lock, or not be written to, one warning says so and training goes on.

    Raises:
        FolderInUseError: another process or thread holds it.
    """
    folder = Path(folder).resolve()
    if folder in _held.folders:
        yield
        return
    path = folder / LOCK_FILE
    descriptor = _locked(path)
    _held.folders.add(folder)
    try:
        yield
    finally:
        _held.folders.discard(folder)
        if descriptor in _open:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is locked: who has opened it meanwhile sees that, and makes another
            _open.discard(descriptor)
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """The open, locked file, or None where there is no locking."""
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _attempt(path)) is None:
            pass
        return descriptor
    except BlockingIOError as error:
        raise FolderInUseError(
            f"{path.parent}: another training writes here ({_owner(path)}); wait for its end, stop it, or choose "
            "another output folder"
        ) from error
    except OSError as error:
        logger.warning(
            "%s: cannot be locked (%s), so nothing keeps a second training out of this folder", path.parent, error
        )
        return None


def _attempt(path: Path) -> int | None:
    """The open, locked file, or None where its holder removed it in between."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):
            owner = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
            os.ftruncate(descriptor, 0)
            os.write(descriptor, owner.encode())
            _open.add(descriptor)
            return descriptor
        return None
    finally:
        if descriptor not in _open:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a name still belongs to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    """What its holder wrote, as one printable line."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_OWNER_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    return "".join(letter for letter in text if letter.isprintable()) or "its lock file does not say which"


def _leave_to_parent() -> None:
    """In a forked process, such as of a data loader: what it inherits would hold the lock beyond its parent's death."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()
    _held.folders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
