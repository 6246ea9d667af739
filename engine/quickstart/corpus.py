"""The source of Python's standard library, split by module into training and held-out parts.

Used by the two scripts that made this folder's assets: `pretrain.py` (the backbone) and `docstrings.py` (the task).
A module and its tests fall on the same side, and so does everything in one package, so that nothing held out is ever
seen in training. The text is licensed under the PSF License Version 2 (see LICENSE-PSF.txt).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Generated tables and deliberately broken syntax: not text that a language model should learn.
SKIPPED_PARTS = (
    "site-packages",
    "encodings",
    "pydoc_data",
    "lib2to3/tests/data",
    "test/encoded_modules",
    "/bad_",
    "badsyntax",
)
MAX_FILE_BYTES = 400_000


@dataclass(frozen=True)
class SourceFile:
    """One file: `module` is its top-level name with a leading `test_` removed."""

    path: Path
    module: str
    is_test: bool
    text: str


def is_heldout(module: str) -> bool:
    """True for about one module in ten, decided by the module's name alone."""
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0


def standard_library(root: Path | None = None) -> list[SourceFile]:
    """Every readable Python file of the standard library below `root`, sorted by path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in SKIPPED_PARTS) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        parts = [part for part in name.removesuffix(".py").split("/") if part not in ("test", "tests")]
        if not text.strip() or not parts:
            continue
        is_test = "test" in name.split("/") or "tests" in name.split("/")
        files.append(SourceFile(path, parts[0].removeprefix("test_").lstrip("_"), is_test, text))
    return files
