"""`ladder doctor`: every fault is found and has a remedy, and the exit code says whether training can run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from engine.cli import app, diagnosis
from ladder_kernels import native


def findings() -> str:
    return "\n".join(finding.line() for finding in diagnosis.diagnose().findings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An RTX 3060 as torch and nvidia-smi describe it; kernels are not run on it."""
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3060", total_memory=12_500_000_000, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (properties.major, properties.minor))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(diagnosis, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(diagnosis, "_kernel_findings", lambda: [])
    return properties


def test_this_machine_can_train() -> None:
    """Where the tests run training runs; and `info` shows the same system lines."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.output.endswith("\nTraining can run.\n") and "error:" not in result.output
    for line in (*diagnosis.system_lines(), "compilers       C ", "host memory     ", "disk            "):
        assert line in result.output
    assert all(f"{name} {diagnosis.version(name) or 'absent'}" in result.output for name in ("torch", "trl", "torchao"))
    assert CliRunner().invoke(app, ["info"]).output == "\n".join(diagnosis.system_lines()) + "\n"


def test_gpu(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    described = "RTX 3060, 12.5 GB, compute capability 8.6, CUDA 13.0, driver 580.65.06, one of 2"
    assert described in diagnosis.system_lines()[2]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(diagnosis.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(diagnosis, "_compilers", lambda: {"C": "gcc", "C++": "g++", "cmake": None})
    assert diagnosis.diagnose().can_train
    gpu.major, gpu.minor = 6, 1
    assert "error: the GPU has compute capability 6.1, the kernels need 7.5" in findings()
    assert not diagnosis.diagnose().can_train


def test_what_triton_compiles_with(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(diagnosis.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "error: Python.h is absent" in findings() and "python3-dev" in findings()
    monkeypatch.setattr(diagnosis, "_compilers", lambda: {"C": None, "C++": None, "cmake": None})
    assert "error: no C compiler, with which Triton builds its launcher" in findings()


@pytest.mark.parametrize(
    ("driver", "cuda", "hidden", "message"),
    [
        (None, None, None, "note: no NVIDIA GPU or driver was found; training runs on the CPU"),
        ("580.65", None, None, r"driver \(580.65\), but torch .* is a build for CPUs; install a CUDA build"),
        ("470.01", "13.0", None, "torch for CUDA 13.0 sees no GPU through driver 470.01; update the driver"),
        ("580.65", "13.0", "", "CUDA_VISIBLE_DEVICES='' may hide it; unset it"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, cuda: str | None, hidden: str | None, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(diagnosis, "_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert re.search(message, findings())
    assert diagnosis.diagnose().can_train


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From nvidia-smi; one that fails is no version."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert diagnosis._driver() is None
    for body, expected in (("echo 580.65.06; echo 580.65.06", "580.65.06"), ("echo no; exit 9", None), ("", None)):
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        assert diagnosis._driver() == expected


def versions(changes: dict[str, str | None]) -> Callable[[str], str]:
    real = metadata.version

    def version(name: str) -> str:
        found = changes[name] if name in changes else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    return version


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing one that is needed is an error, one of another version or for extras a note."""
    requires = ["torch<2.14,>=2.11", "safetensors>=0.8", 'triton>=3.6; sys_platform == "none"', 'trl; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    monkeypatch.setattr(metadata, "version", versions({"torch": "2.9.0", "trl": None, "triton": None}))
    report = diagnosis.diagnose()
    assert "note: torch 2.9.0 is not <2.14,>=2.11, which is what was tested; pip install 'torch" in report.text()
    assert "note: trl is absent; pip install trl (only for training under SFTTrainer)" in report.text()
    assert "triton is absent" not in report.text() and "triton absent" in report.lines[1] and report.can_train
    monkeypatch.setattr(metadata, "version", versions({"torch": "2.12.0+cu130", "safetensors": None}))
    report = diagnosis.diagnose()
    assert "torch 2.12.0+cu130 is not" not in report.text()
    assert "error: safetensors is absent; pip install 'safetensors>=0.8'" in report.text() and not report.can_train
    assert report.text().endswith("Training cannot run: mend what is marked as error.")


def test_a_source_tree_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    monkeypatch.setattr(metadata, "version", versions({"accelerate": None}))
    assert "error: accelerate is absent; pip install 'accelerate'" in findings()


def test_no_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a card would miss the C compiler as well
    missing = native.NativeStatus("reference", None, None, "not built")
    monkeypatch.setattr(native, "status", lambda: missing)
    assert "see why the build failed with pip install -v" in findings()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    report = diagnosis.diagnose()
    assert "install a C++ compiler (apt install g++)" in report.text() and report.can_train
    assert "absent, slower plain-torch kernels run instead: not built" in report.lines[3]


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_free_memory", lambda: 1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000_000))
    monkeypatch.setattr(diagnosis.os, "access", lambda path, mode: False)
    text = findings()
    assert "only 1.0 GB of host memory" in text and "only 0.5 GB of disk" in text and "cannot be written to" in text
    monkeypatch.setattr(diagnosis, "_free_memory", lambda: None)
    assert "host memory     unknown available" in diagnosis.diagnose().lines


def test_a_kernel_that_fails_or_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import ladder_kernels

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(ladder_kernels, "nf4_linear", broken)
    report = diagnosis.diagnose()
    assert "error: a kernel does not run (RuntimeError: no kernel image is available)" in report.text()
    assert not report.can_train and CliRunner().invoke(app, ["doctor"]).exit_code == 1
    monkeypatch.setattr(ladder_kernels, "nf4_linear", lambda x, weight: x)
    assert "error: a kernel computes 64.0 where 4096 is right" in findings()


def test_without_torch() -> None:
    """Where torch cannot be imported the report still comes, with the cause."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from typer.testing import CliRunner\n"
        "from engine.cli import app\n"
        "result = CliRunner().invoke(app, ['doctor'])\n"
        "assert result.exit_code == 1, result.output\n"
        "assert 'error: torch cannot be imported (' in result.output, result.output\n"
        "assert 'Training cannot run' in result.output, result.output\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
