"""Which implementation of `ladder_kernels` runs: asked of the loaded library, never assumed."""

from __future__ import annotations

import torch

from ladder_kernels import native


def kernels_path(device: torch.device) -> str:
    """Either "native" with its instruction set, or "reference" for plain torch.

    A source tree on `sys.path` shadows an installed package and its library, so a row says what the process that was
    timed had really loaded, and "native" is only ever said of a loaded library.
    """
    status = native.status()
    if device.type != "cpu" or status.implementation != "native":
        return "reference"
    return f"native {status.isa}"


def kernels_notice(device: torch.device) -> str:
    """One sentence for the head of a benchmark's output."""
    reason = native.status().reason if device.type == "cpu" else f"no kernels for {device.type} are built in"
    return f"ladder_kernels runs as: {kernels_path(device)} ({reason})"
