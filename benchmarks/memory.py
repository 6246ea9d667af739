"""Peak memory growth, in MiB above a baseline, on the CPU (resident set) or a GPU (allocated bytes)."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path

import torch

MIB = 2**20
_SAMPLING_SECONDS = 0.002


class MemoryMeter:
    """Current and peak memory of this process on one device.

    On Linux the kernel keeps the resident set's high-water mark and lets a process reset its own; where it refuses, a
    thread samples the resident set instead. Call `reset_peak`, do the work, read `peak_mib`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampler: _ResidentSampler | None = None

    def settle(self) -> None:
        """Return freed memory to the system, so that its reuse cannot hide growth."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def current_mib(self) -> float:
        """Memory held now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / MIB
        return _status_mib("VmRSS")

    def reset_peak(self) -> None:
        """Start a new high-water mark at the memory held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif not _reset_high_water_mark():
            self._sampler = _ResidentSampler()

    def peak_mib(self) -> float:
        """High-water mark since `reset_peak`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MIB
        if self._sampler is not None:
            return self._sampler.stop()
        return _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {field} in /proc/self/status, found none: memory is measured on Linux only")


def _reset_high_water_mark() -> bool:
    """Whether the kernel set VmHWM back to VmRSS."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _status_mib("VmHWM")
    except (OSError, RuntimeError):
        return False
    return True


class _ResidentSampler(threading.Thread):
    """Largest resident set seen, sampled every two milliseconds; shorter peaks are missed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak_mib = _status_mib("VmRSS")
        self.start()

    def run(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._peak_mib = max(self._peak_mib, _status_mib("VmRSS"))

    def stop(self) -> float:
        self._done.set()
        self.join()
        return max(self._peak_mib, _status_mib("VmRSS"))
