"""Text that every machine with the project's dependencies has: the source of installed packages.

A file is held out or not by its name alone, as in the quickstart's corpus, so that a larger backbone may be pretrained
on the rest. The text depends on the versions of the packages, so losses on it compare within one environment.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from engine.quickstart.corpus import MAX_FILE_BYTES, SourceFile

PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx")
# Copies of one another with a name changed, and tables: neither tells a model anything, and copies would leak.
SKIPPED_PARTS = ("transformers/models/", "torch/testing/", "numpy/distutils/", "/_vendor/", "/tests/", "/test_")
MIN_FILE_BYTES = 200


def package_files(package: str) -> Iterator[SourceFile]:
    """The readable Python files of an installed package, tests left out, in the order of their names.

    `module` is the whole path without `.py`, as "torch/nn/functional".

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} is not installed; its source is text of this benchmark")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        name = f"{package}/{path.relative_to(root).as_posix()}"
        if any(part in name for part in SKIPPED_PARTS) or not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield SourceFile(path, name.removesuffix(".py"), False, text)
