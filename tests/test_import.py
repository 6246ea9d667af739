"""Importing the kernels loads and touches nothing."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import socket, sys
import torch
assert not torch.cuda.is_initialized()
def no_device(*args, **kwargs):
    raise AssertionError("device query or network access on import")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = no_device
socket.socket.connect = no_device
import ladder_kernels
from ladder_kernels import native
assert native._load.cache_info().currsize == 0, "the native library was looked for on import"
assert not torch.cuda.is_initialized()
loaded = [name for name in ("bitsandbytes", "peft", "transformers", "triton", "engine") if name in sys.modules]
print(sorted(loaded))
assert sorted(ladder_kernels.__all__) == ladder_kernels.__all__
assert all(hasattr(ladder_kernels, name) for name in ladder_kernels.__all__)
"""


def test_import_is_free_of_side_effects():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
