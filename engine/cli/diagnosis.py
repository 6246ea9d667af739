"""`ladder doctor`: what this machine has, what is missing, and what to do about it.

It must speak where torch or Triton cannot even be imported, so nothing here imports them at the top.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from packaging.requirements import Requirement

import engine

USED = ("torch", "triton", "transformers", "accelerate", "safetensors")
OPTIONAL = {
    "datasets": "training on datasets.Dataset",
    "trl": "training under SFTTrainer",
    "bitsandbytes": "benchmarks against it; its checkpoints are read without it",
    "torchao": "--optimizer adamw_8bit",
}
LEAST_CAPABILITY = (7, 5)
LITTLE_DISK, LITTLE_MEMORY = 2e9, 4e9


@dataclass(frozen=True)
class Finding:
    """Something to mend; training cannot run with a fatal one."""

    problem: str
    remedy: str
    is_fatal: bool = False

    def line(self) -> str:
        return f"{'error' if self.is_fatal else 'note'}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class Report:
    """Facts line by line, and what to mend."""

    lines: list[str]
    findings: list[Finding]

    @property
    def can_train(self) -> bool:
        return not any(finding.is_fatal for finding in self.findings)

    def text(self) -> str:
        verdict = "Training can run." if self.can_train else "Training cannot run: mend what is marked as error."
        return "\n".join([*self.lines, "", *(finding.line() for finding in self.findings), verdict])


def diagnose() -> Report:
    """Look at versions, GPU, native library, compilers, memory and disk, and run one kernel."""
    lines = [*system_lines(), _compiler_line(), *_space_lines()]
    findings = [*_package_findings(), *_device_findings(), *_native_findings(), *_space_findings()]
    if not any(finding.is_fatal for finding in findings):
        findings += _kernel_findings()
    return Report(lines, findings)


def system_lines() -> list[str]:
    """Versions, device and the state of the native library."""
    names = (*USED, *OPTIONAL)
    return [
        f"ladder-engine   {engine.__version__}, Python {platform.python_version()}, {platform.platform()}",
        "versions        " + ", ".join(f"{name} {version(name) or 'absent'}" for name in names),
        f"device          {_device()}",
        f"native library  {_native()}",
    ]


def version(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"unknown, torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return f"cpu, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, compute capability "
        f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}"
        + (f", one of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else "")
    )


def _driver() -> str | None:
    """Version of the NVIDIA driver, whether torch can use it or not."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip() or None
    return None


def _native() -> str:
    try:
        from ladder_kernels import native
    except (ImportError, OSError) as error:
        return f"unknown, the kernels cannot be imported: {error}"
    status = native.status()
    if status.implementation == "native":
        return f"{status.path} ({status.isa})"
    return f"absent, slower plain-torch kernels run instead: {status.reason}"


def _compiler_line() -> str:
    found = ", ".join(f"{name} {path or 'absent'}" for name, path in _compilers().items())
    return f"compilers       {found}"


def _compilers() -> dict[str, str | None]:
    """C and C++ compilers as Triton and CMake look for them, and CMake, which pip brings along where it builds."""
    cc = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return {"C": cc, "C++": cxx, "cmake": shutil.which("cmake")}


def _space_lines() -> list[str]:
    memory, disk = _free_memory(), shutil.disk_usage(".").free
    known = "unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    return [f"host memory     {known} available", f"disk            {disk / 1e9:.1f} GB free in {Path.cwd()}"]


def _free_memory() -> int | None:
    with suppress(ImportError, OSError):
        from engine.backbone.host_memory import available_bytes

        return available_bytes()
    return None


def _package_findings() -> Iterator[Finding]:
    for requirement in _requirements():
        installed = version(requirement.name)
        if installed is None:
            yield Finding(f"{requirement.name} is absent", f"pip install '{requirement}'", is_fatal=True)
        elif not requirement.specifier.contains(installed, prereleases=True):
            problem = f"{requirement.name} {installed} is not {requirement.specifier}, which is what was tested"
            yield Finding(problem, f"pip install '{requirement.name}{requirement.specifier}'")
    for name, purpose in OPTIONAL.items():
        if version(name) is None:
            yield Finding(f"{name} is absent", f"pip install {name} (only for {purpose})")


def _requirements() -> list[Requirement]:
    """What the installed distribution asks for on this platform, without extras; nothing for a bare source tree."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("ladder-engine") or ()]
    except metadata.PackageNotFoundError:
        return [Requirement(name) for name in USED if name != "triton" or sys.platform == "linux"]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _device_findings() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(f"torch cannot be imported ({error})", "install it again: https://pytorch.org", is_fatal=True)
        return
    if not torch.cuda.is_available():
        driver = _driver()
        if driver is None:
            yield Finding("no NVIDIA GPU or driver was found", "training runs on the CPU, for small models")
        elif torch.version.cuda is None:
            problem = f"there is an NVIDIA driver ({driver}), but torch {torch.__version__} is a build for CPUs"
            yield Finding(problem, "install a CUDA build: https://pytorch.org")
        else:
            problem = f"torch for CUDA {torch.version.cuda} sees no GPU through driver {driver}"
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            remedy = "update the driver" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} may hide it; unset it"
            yield Finding(problem, remedy)
        return
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        have, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        problem = f"the GPU has compute capability {have}, the kernels need {least} (RTX 20 and newer)"
        yield Finding(problem, "use another card, or the CPU with CUDA_VISIBLE_DEVICES=''", is_fatal=True)
    if sys.platform == "linux" and _compilers()["C"] is None:
        problem = "no C compiler, with which Triton builds its launcher on first use"
        yield Finding(problem, "install gcc (apt install gcc), or set CC", is_fatal=True)
    elif sys.platform == "linux" and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        problem = "Python.h is absent, which Triton's launcher is compiled with"
        yield Finding(problem, "install Python's headers (apt install python3-dev)", is_fatal=True)


def _native_findings() -> Iterator[Finding]:
    try:
        from ladder_kernels import native
    except (ImportError, OSError) as error:
        yield Finding(f"the kernels cannot be imported ({error})", "install ladder-engine again", is_fatal=True)
        return
    if native.status().implementation == "native":
        return
    if _compilers()["C++"] is None:
        remedy = "install a C++ compiler (apt install g++) and then ladder-engine again"
    else:
        remedy = "a C++ compiler is here: see why the build failed with pip install -v"
    yield Finding("the native library is absent: CPU kernels are several times slower", remedy)


def _space_findings() -> Iterator[Finding]:
    memory, disk = _free_memory(), shutil.disk_usage(".").free
    if memory is not None and memory < LITTLE_MEMORY:
        yield Finding(f"only {memory / 1e9:.1f} GB of host memory are available", "close other programs")
    if disk < LITTLE_DISK:
        yield Finding(f"only {disk / 1e9:.1f} GB of disk are free here", "make room, or train with --output elsewhere")
    if not os.access(".", os.W_OK):
        yield Finding("this folder cannot be written to", "train with --output elsewhere")


def _kernel_findings() -> list[Finding]:
    """Import the trainer and run one kernel where training will: the proof that the parts work together."""
    try:
        import torch

        from ladder_kernels import nf4_linear, quantize_nf4

        import_module("engine.training.trainer")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = quantize_nf4(torch.ones(64, 64, device=device))
        total = float(nf4_linear(torch.ones(1, 64, device=device), weight).sum())
    except Exception as error:  # whatever is broken is what the user must read
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [Finding(f"a kernel does not run ({type(error).__name__}: {first})", "report it with this text", True)]
    if total != 64 * 64:
        return [Finding(f"a kernel computes {total} where {64 * 64} is right", "report it with this text", True)]
    return []
