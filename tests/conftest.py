"""Fixtures of all tests. Runs before anything imports torch."""

from __future__ import annotations

import os
import sys

# The oracle compiles its own reference ops on ragged shapes, for seconds each.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._device import _device_constructors

from ladder_kernels import native

# Kernels are interpreted where there is no GPU: Triton decides when a kernel is defined, so before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_device_constructors()  # torch lists its own constructors once: before one of them is replaced below

# The gate draws the same inputs on every run; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("gate", derandomize=True)
settings.load_profile("gate")

KERNEL_TESTS = (
    "test_nf4",
    "test_nf4_linear",
    "test_decoder_block",
    "test_tap",
    "test_side_layer",
    "test_linear_cross_entropy",
    "test_head",
    "test_elementwise",
    "test_ops",
    "test_native",
    "test_gpu_nf4",
    "test_gpu_linear",
    "test_gpu_tap",
    "test_gpu_side_layer",
    "test_gpu_cross_entropy",
    "test_gpu_elementwise",
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second at the end of every training adds up."""
    if request.module.__name__ != "test_run_log" and "engine.training.run_log" in sys.modules:
        monkeypatch.setattr("engine.training.run_log.draw_training", lambda lines, path: None)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In kernel tests fresh memory holds NaN (integers: all bits set), so reading what nobody wrote is seen."""
    if request.module.__name__ not in KERNEL_TESTS:
        return

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if type(tensor) is not torch.Tensor or tensor.device.type == "meta" or tensor.dtype == torch.bool:
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point():
                    return tensor.fill_(float("nan"))
                return tensor.fill_(255 if tensor.dtype == torch.uint8 else -1)

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def gpu_device() -> torch.device:
    """The GPU, or the CPU, which is where Triton's interpreter takes its tensors from."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For toy problems: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Torch's deterministic algorithms."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(was_enabled)


def require_native() -> None:
    """Skip, or fail under LADDER_REQUIRE_NATIVE=1, where the native library is absent."""
    status = native.status()
    if status.implementation != "native":
        message = f"needs the native library: {status.reason}"
        if os.environ.get("LADDER_REQUIRE_NATIVE") == "1":
            pytest.fail(message)
        pytest.skip(message)


# Where another build of the library is tested, plain torch is the same as ever.
PLAIN_TORCH = [] if os.environ.get("LADDER_TEST_NATIVE_ONLY") == "1" else ["reference"]


@pytest.fixture(params=[*PLAIN_TORCH, *native.available_isas()])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once per implementation: plain torch, and every instruction set that runs here."""
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: False)
        yield request.param
        return
    with _isa(request.param):
        yield request.param


@pytest.fixture(params=native.available_isas())
def native_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that runs here: not at all without the native library."""
    with _isa(request.param):
        yield request.param


@contextmanager
def _isa(name: str) -> Iterator[None]:
    selected = native.status().isa
    native.select_isa(name)
    yield
    native.select_isa(selected or "")
