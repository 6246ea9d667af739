"""Where a number comes from: hardware, versions, commit, and how much of the CPU other processes took meanwhile."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import engine

FOREIGN_LOAD_LIMIT_PERCENT = 5.0
_REPOSITORY = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("torch", "transformers", "triton", "bitsandbytes", "peft")


def provenance(device: torch.device) -> dict[str, str]:
    """Device, CPU, threads, versions, commit and date, all as text; a missing package is an empty version."""
    commit, dirty = _git_state()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }
    facts |= {name: _version(name) for name in _DISTRIBUTIONS}
    # The imported engine, not an installed one that a source tree may shadow.
    return facts | {"ladder_engine": engine.__version__, "commit": commit, "dirty": dirty}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git_state() -> tuple[str, str]:
    """Commit, and "yes" or "no" for uncommitted changes other than results, which every run makes.

    A source tree that travelled without its repository is told its commit by `LADDER_COMMIT`.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LADDER_COMMIT") or "unknown", "unknown"
    return commit, "yes" if changes else "no"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    """Model name, with the matrix units that decide speed, for example "Intel Xeon ... (avx512)"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    units = [key for key, present in torch.cpu.get_capabilities().items() if present is True and key in _CPU_UNITS]
    return f"{name} ({' '.join(sorted(units))})" if units else name


_CPU_UNITS = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16", "sve")


@dataclass(frozen=True)
class CpuTimes:
    """Clock ticks since boot, of all cores together.

    Attributes:
        total: every state, idle included.
        busy: spent computing, by anyone, time stolen by other virtual machines included.
        own: spent by this process and its descendants.
    """

    total: int
    busy: int
    own: int


def read_cpu_times(proc: Path = Path("/proc")) -> CpuTimes | None:
    """Ticks now, or None where there is no Linux procfs."""
    try:
        fields = [int(value) for value in (proc / "stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _io_wait, interrupt, soft_interrupt, stolen = fields
    return CpuTimes(
        total=sum(fields),
        busy=user + nice + system + interrupt + soft_interrupt + stolen,
        own=_own_ticks(proc, os.getpid()),
    )


def _own_ticks(proc: Path, root: int) -> int:
    """Ticks of `root` and its descendants, with those of children that have ended and were waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended since the listing
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = sum(int(value) for value in fields[11:15])
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(ticks.get(pid, 0) for pid in family)


def foreign_load_percent(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Share of all cores' time that other processes took between two readings, in percent; None where unknown."""
    if before is None or after is None or after.total <= before.total:
        return None
    foreign = (after.busy - before.busy) - (after.own - before.own)
    return 100.0 * max(foreign, 0) / (after.total - before.total)


def mark_of(foreign_percent: float | None) -> str:
    """Empty for a clean row, "foreign_load" above the limit, "load_unknown" where it could not be measured."""
    if foreign_percent is None:
        return "load_unknown"
    return "foreign_load" if foreign_percent > FOREIGN_LOAD_LIMIT_PERCENT else ""
