"""What a run measured: throughput, peak memory and the file that ends it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Summary:
    """The result of `ladder train`, written to `summary.json`.

    Attributes:
        heldout_loss_before: mean cross-entropy in nats per supervised held-out token, before the first step.
        heldout_loss_after: the same after the last step.
        steps: optimizer steps.
        seconds: wall time of the steps, without evaluations.
        tokens_per_second: tokens trained on, prompts included, over `seconds`.
        peak_mib: peak memory as in `PeakMemory`.
        trainable_parameters: parameters of the side network.
        preset: name of the side network's preset.
        device: where it ran.
    """

    heldout_loss_before: float
    heldout_loss_after: float
    steps: int
    seconds: float
    tokens_per_second: float
    peak_mib: float
    trainable_parameters: int
    preset: str
    device: str

    def write(self, folder: Path) -> None:
        """Write `summary.json` into `folder`."""
        (folder / SUMMARY_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class PeakMemory:
    """Peak memory: allocated bytes on a GPU; on a CPU, growth of the resident set since this object was made.

    Neither counter is reset, so that measurements may nest: a higher peak of the process from before counts as well.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._baseline = 0 if self._device.type == "cuda" else _resident_bytes("VmRSS")

    def mib(self) -> float:
        """The peak so far, in MiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return max(_resident_bytes("VmHWM") - self._baseline, 0) / 2**20


def _resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of this process; without /proc, the highest stands in for both."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource
        import sys

        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else highest * 1024
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


class StepClock:
    """Wall time, tokens and arithmetic of training steps alone; evaluations and saves stop it.

    Args:
        device: what computes.
        card_flops: what it can do per second, where that is known.
    """

    def __init__(self, device: torch.device, card_flops: float | None = None) -> None:
        self._device = device
        self._started: float | None = None
        self._seconds = 0.0
        self._last = (0, 0.0, 0.0)
        self.card_flops = card_flops
        self.tokens = 0
        self.flops = 0.0

    def count(self, tokens: int, flops: float = 0.0) -> None:
        """Add the work of a pass that begins now, which starts the clock if it stands."""
        self._started = time.perf_counter() if self._started is None else self._started
        self.tokens += tokens
        self.flops += flops

    def rates(self) -> dict[str, float]:
        """Since the last call: `tokens_per_second` and, on a known card, `mfu`, the share of its arithmetic in use."""
        now = (self.tokens, self.flops, self.seconds)
        tokens, flops, seconds = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        if not seconds:
            return {}
        rates = {"tokens_per_second": round(tokens / seconds, 1)}
        if self.card_flops is not None:
            rates["mfu"] = round(flops / seconds / self.card_flops, 4)
        return rates

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Not counting inside; the next `count` starts the clock again."""
        self.stop()
        yield

    def stop(self) -> None:
        """Stop after the device has finished what it was given."""
        if self._started is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds += time.perf_counter() - self._started
            self._started = None
