"""Which implementation of `ladder_kernels` runs: asked of the loaded library or seen launched, never assumed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ladder_kernels import native


def kernels_path(device: torch.device) -> str:
    """Either "native" with its instruction set, or "reference" for plain torch.

    A source tree on `sys.path` shadows an installed package and its library, so a row says what the process that was
    timed had really loaded, and "native" is only ever said of a loaded library. On a GPU see `LaunchCount`.
    """
    status = native.status()
    if device.type != "cpu" or status.implementation != "native":
        return "reference"
    return f"native {status.isa}"


def kernels_notice(device: torch.device) -> str:
    """One sentence for the head of a benchmark's output."""
    if device.type != "cpu":
        return "ladder_kernels: rows name the Triton launches that were seen, or the reference where there were none"
    return f"ladder_kernels runs as: {kernels_path(device)} ({native.status().reason})"


@dataclass
class LaunchCount:
    """Triton kernels launched while `count_triton_launches` was open."""

    launches: int = 0

    def path(self) -> str:
        """ "triton" with the number of launches of one call, or "reference" where plain torch did everything."""
        return f"triton, {self.launches} launches" if self.launches else "reference"


@contextmanager
def count_triton_launches() -> Iterator[LaunchCount]:
    """Count the Triton launches of this process; replays of a CUDA graph are none."""
    count = LaunchCount()
    if importlib.util.find_spec("triton") is None:
        yield count
        return
    from triton import knobs

    def seen(*_: object) -> None:
        count.launches += 1

    knobs.runtime.launch_enter_hook.add(seen)
    try:
        yield count
    finally:
        knobs.runtime.launch_enter_hook.remove(seen)
