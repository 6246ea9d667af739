"""Other builds of the native library: sanitized, with emulated units, for another architecture.

One build carries AddressSanitizer, UndefinedBehaviorSanitizer and the AVX512-BF16 and AMX paths computed with AVX-512,
and runs the kernel tests in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ladder_kernels import native

ROOT = Path(__file__).parents[1]
KERNEL_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("nf4_linear", "native", "nf4", "linear_cross_entropy", "elementwise", "side_layer", "decoder_block")
)
# Left out: the comparison with bitsandbytes on large inputs, and a matrix whose pages a sanitizer would touch.
SELECTION = "not two_billion and not equals_bitsandbytes and not quantized_scales_follow"


def build(folder: Path, *options: str) -> Path:
    """Configure and build csrc/ with warnings as errors; skip where there is no CMake or no compiler at all."""
    if shutil.which("cmake") is None or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        if os.environ.get("LADDER_REQUIRE_NATIVE") == "1":
            pytest.fail("needs CMake and a C++ compiler")
        pytest.skip("needs CMake and a C++ compiler")
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-DLADDER_STRICT=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / native.LIBRARY_NAME


def environment(library: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "LADDER_NATIVE_LIB": str(library), "LADDER_TEST_NATIVE_ONLY": "1", **more}


def test_sanitized_and_emulated(tmp_path):
    if sys.platform != "linux":
        pytest.skip("preloads the sanitizer's runtime")
    library = build(tmp_path, "-DLADDER_SANITIZE=ON", "-DLADDER_EMULATE_BF16_UNITS=ON")
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    # The C++ runtime too: the sanitizer looks for what it intercepts when it starts, before torch brings that along.
    preloaded = [line.split()[2] for line in linked.splitlines() if "libasan" in line or "libstdc++" in line]
    report = tmp_path / "report"
    env = environment(
        library,
        LADDER_TEST_EMULATED="1",
        LD_PRELOAD=" ".join(preloaded),
        ASAN_OPTIONS=f"detect_leaks=0:log_path={report}",
        UBSAN_OPTIONS=f"print_stacktrace=1:log_path={report}",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SELECTION, *KERNEL_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    reports = "".join(path.read_text() for path in tmp_path.glob("report*"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:] + reports[:5000]


def test_clang_builds_it_too(tmp_path):
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++")
    library = build(tmp_path, "-DCMAKE_CXX_COMPILER=clang++")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SELECTION, *KERNEL_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(library), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_other_architectures_get_the_scalar_path(tmp_path):
    library = build(tmp_path, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=riscv64")
    code = "from ladder_kernels import native; print(*native.available_isas())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(library), check=True)
    assert done.stdout.split() == ["scalar"]
