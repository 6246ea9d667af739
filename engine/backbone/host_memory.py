"""How much host memory there is, and pinning it for copies that run beside computation.

Pinning is by cudaHostRegister on memory that exists: exactly its pages, nothing rounded up. The driver does its own
page-locking, so RLIMIT_MEMLOCK (`ulimit -l`) does not count; what can refuse is the system (WSL 2 pins at most about
half of the memory, a container with less than it shows).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Host memory that can be taken without swapping, within the container's limit; None where Linux does not say."""
    with suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in (_PROC / "meminfo").read_text().splitlines())
        system = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
        return min((size for size in (system, _cgroup_bytes()) if size is not None), default=None)
    return None


def _cgroup_bytes() -> int | None:
    """What is left of the memory limit of this process's control group (version 2); None without a limit."""
    with suppress(OSError, ValueError):
        entry = next(line for line in (_PROC / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
        # Inside a container the group may be shown under a path that is not mounted there: its own is then the root.
        for group in (_CGROUP / entry[3:].lstrip("/"), _CGROUP):
            if (limit := group / "memory.max").exists():
                if limit.read_text().strip() == "max":
                    return None
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
                return max(int(limit.read_text()) - used, 0)
    return None


def check_available(needed: int) -> None:
    """Raise ValueError if the packed layers of a backbone, `needed` bytes, do not fit in host memory."""
    available = available_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"the packed layers need {needed / 1e9:.2f} GB of host memory, of which {available / 1e9:.2f} GB are "
            "available: pass packed_cache=, a file on a disk with as much space, from which they are mapped, or "
            "residency='device' if the device can hold them"
        )


def pin(buffers: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Page-lock buffers, each alone on its pages, for copies to a CUDA device; `unpin` must follow.

    Returns:
        those that were pinned. With a warning not all: copies from the others work, but hold up whoever starts them.
    """
    runtime = torch.cuda.cudart()
    for count, buffer in enumerate(buffers):
        error = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1)  # 1: portable, for every device
        if int(error):
            # The failed call left its error behind, for the next launch to report: let it do so here.
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
            done, total = (sum(b.nbytes for b in part) / 1e9 for part in (buffers[:count], buffers))
            warnings.warn(
                f"only {done:.2f} of {total:.2f} GB of the backbone's host memory could be pinned "
                f"(cudaHostRegister: {runtime.cudaGetErrorString(error)}); the rest is copied as pageable memory, "
                "which is slower. Free host memory, or raise the limit of the container or virtual machine",
                RuntimeWarning,
                stacklevel=2,
            )
            return list(buffers[:count])
    return list(buffers)


def unpin(buffers: Sequence[Tensor], device: torch.device) -> None:
    """Release what `pin` returned, after copies from it have ended."""
    torch.cuda.synchronize(device)
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
