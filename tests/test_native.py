"""The native library: what it loads, how it says that it is absent, and its number conversions."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import require_native
from numerics import assert_same_bits

from ladder_kernels import NF4Weight, dequantize_nf4, native, nf4_linear, quantize_nf4
from ladder_kernels import native_abi as abi
from ladder_kernels.nf4 import NF4_CODES

# Set by test_native_build.py, whose build computes the paths of missing units with AVX-512.
EMULATED = os.environ.get("LADDER_TEST_EMULATED") == "1"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for anew, and again after the test."""
    native._load.cache_clear()
    native._warn_absent.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._load.cache_clear()
    native._warn_absent.cache_clear()


def test_library_is_in_use():
    require_native()
    status = native.status()
    assert status.implementation == "native" and status.isa in native.available_isas()
    assert status.path is not None and status.path.is_file()
    assert "scalar" in native.available_isas()


def test_absent_library_gives_the_same_bits_after_one_warning(fresh, tmp_path):
    weight, x = torch.randn(37, 53, dtype=torch.bfloat16), torch.randn(3, 53)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = quantize_nf4(weight)
        expected_decoded, expected_out = dequantize_nf4(expected, torch.float16), nf4_linear(x, expected)
    native._load.cache_clear()
    native._warn_absent.cache_clear()
    fresh.setenv("LADDER_NATIVE_LIB", str(tmp_path / "nowhere.so"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = quantize_nf4(weight)
        decoded, out = dequantize_nf4(actual, torch.float16), nf4_linear(x, actual)
    assert [str(w.message) for w in caught if "ladder info" in str(w.message)] == [str(w.message) for w in caught]
    assert len(caught) == 1 and "nowhere.so" in str(caught[0].message)
    for name in ("packed", "absmax", "absmax_scale", "absmax_offset"):
        assert_same_bits(name, getattr(actual, name), getattr(expected, name))
    assert_same_bits("decoded", decoded, expected_decoded)
    assert_same_bits("out", out, expected_out)
    status = native.status()
    assert (status.implementation, status.path, status.isa) == ("reference", None, None)
    assert "LADDER_NATIVE_LIB names a file that does not exist" in status.reason
    assert native.available_isas() == ()
    with pytest.raises(ValueError, match="no native library"):
        native.select_isa("scalar")


def test_status_does_not_warn(fresh, tmp_path):
    fresh.setenv("LADDER_NATIVE_LIB", str(tmp_path / "nowhere.so"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.status().implementation == "reference"


def test_every_entry_of_the_package_path_is_searched(fresh, tmp_path):
    require_native()
    library = native.status().path
    native._load.cache_clear()
    fresh.delenv("LADDER_NATIVE_LIB", raising=False)
    (tmp_path / "second").mkdir()
    copy = tmp_path / "second" / native.LIBRARY_NAME
    copy.write_bytes(library.read_bytes())
    fresh.setattr(sys.modules["ladder_kernels"], "__path__", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert native.status().path == copy


def test_file_that_is_no_library(fresh, tmp_path):
    fake = tmp_path / "fake.so"
    fake.write_text("not a library")
    fresh.setenv("LADDER_NATIVE_LIB", str(fake))
    assert "does not load" in native.status().reason


def test_other_abi_version_is_refused(fresh):
    require_native()
    native._load.cache_clear()
    fresh.setattr(abi, "ABI_VERSION", 999)
    status = native.status()
    assert status.implementation == "reference" and "expected 999: reinstall" in status.reason


def test_library_without_a_function_is_refused(fresh):
    require_native()
    native._load.cache_clear()
    fresh.setitem(abi.SIGNATURES, "ladder_no_such", ([], None))
    assert "lacks ladder_no_such: reinstall" in native.status().reason


@pytest.mark.parametrize("isa", native.available_isas())
def test_isa_override(fresh, isa):
    native._load.cache_clear()
    fresh.setenv("LADDER_CPU_ISA", isa)
    assert native.status().isa == isa


def test_unknown_isa_is_an_error(fresh):
    require_native()
    native._load.cache_clear()
    fresh.setenv("LADDER_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"LADDER_CPU_ISA: expected one of .*scalar.*got 'sse9'"):
        native.status()


def test_isas_are_those_of_the_cpu():
    require_native()
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("reads /proc/cpuinfo of an x86-64 Linux")
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needed = {
        "avx512": {"avx512f", "avx512bw", "avx512vl"},
        "avx2": {"avx2", "fma", "f16c"},
        "scalar": set(),
    }
    if not EMULATED:
        needed["avx512bf16"] = needed["avx512"] | {"avx512_bf16"}
        needed["amx"] = needed["avx512bf16"] | {"amx_tile", "amx_bf16"}
    assert {isa for isa in native.available_isas() if isa in needed} == {i for i in needed if needed[i] <= flags}


def test_threads_do_not_change_the_bits(implementation):
    weight, x = torch.randn(300, 704), torch.randn(2, 704)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize_nf4(weight, double_quant=False)
        one_decoded, one_out = dequantize_nf4(one, torch.bfloat16), nf4_linear(x, one)
        torch.set_num_threads(3)
        three = quantize_nf4(weight, double_quant=False)
        assert_same_bits("packed", three.packed, one.packed)
        assert_same_bits("absmax", three.absmax, one.absmax)
        assert_same_bits("decoded", dequantize_nf4(one, torch.bfloat16), one_decoded)
        if implementation != "reference":
            assert_same_bits("out", nf4_linear(x, one), one_out)
    finally:
        torch.set_num_threads(threads)


def codebook_weights(values: torch.Tensor) -> list[NF4Weight]:
    """Matrices that decode to the given fp32 values, 16 each, one per code, with scales of 1."""
    return [
        NF4Weight(
            packed=torch.tensor([(2 * i) << 4 | (2 * i + 1) for i in range(8)], dtype=torch.uint8),
            absmax=torch.ones(1),
            codebook=chunk.contiguous(),
            shape=(1, 16),
            dtype=torch.float32,
        )
        for chunk in values.view(-1, 16)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(implementation, dtype):
    """Every rounding case: halfway values and their neighbours over all exponents, subnormals, overflow, NaN."""
    exponents = torch.arange(256, dtype=torch.int32) << 23
    mantissas = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0x18000])
    mantissas = torch.cat([mantissas, torch.tensor([0x7FFFFF, 0x7FF000, 0x7FEFFF, 0x400000])]).int()
    values = (exponents[:, None] | mantissas).view(torch.float32)
    for rows in (values, -values):
        decoded = torch.cat([dequantize_nf4(weight, dtype) for weight in codebook_weights(rows)])
        assert_same_bits(f"to {dtype}", decoded, rows.to(dtype))


def test_reading_every_16_bit_value(implementation):
    """fp16 and bf16 inputs reach the quantizer as the same numbers as through torch."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        weight = bits.view(dtype).view(-1, 64)
        weight = weight[torch.isfinite(weight).all(1)]
        narrow, wide = quantize_nf4(weight, double_quant=False), quantize_nf4(weight.float(), double_quant=False)
        assert_same_bits("packed", narrow.packed, wide.packed)
        assert_same_bits("absmax", narrow.absmax, wide.absmax)


def test_more_than_two_billion_weights():
    """Element numbers above 2^31, in a matrix of untouched zero pages of which only the end is written."""
    require_native()
    rows, cols = (1 << 19) + 3, 4096
    end = quantize_nf4(torch.randn(3, cols), double_quant=False)
    packed = torch.zeros(rows * cols // 2, dtype=torch.uint8)
    packed[-end.packed.numel() :] = end.packed
    absmax = torch.zeros(rows * cols // 64)
    absmax[-end.absmax.numel() :] = end.absmax
    whole = NF4Weight(packed, absmax, end.codebook, (rows, cols), torch.float32)
    decoded = torch.empty(3, cols)
    native.dequantize_nf4(whole.tensors, rows - 3, decoded)
    assert_same_bits("decoded", decoded, dequantize_nf4(end, torch.float32))
    x = torch.randn(1, cols)
    assert_same_bits("out", nf4_linear(x, whole)[:, -3:], nf4_linear(x, end))


def test_codebook_comes_from_the_weight(implementation):
    weight = quantize_nf4(torch.randn(4, 64))
    other = dataclasses.replace(weight, codebook=torch.tensor(NF4_CODES) * 2)
    assert_same_bits("decoded", dequantize_nf4(other, torch.float32), dequantize_nf4(weight, torch.float32) * 2)


def test_exported_symbols_are_the_abi_only():
    require_native()
    if sys.platform != "linux":
        pytest.skip("reads the symbol table with nm")
    path = native.status().path
    output = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    # Type T: strong code symbols. Templates of the C++ runtime may be exported weakly.
    symbols = [line.split() for line in output.splitlines()]
    names = {symbol[-1] for symbol in symbols if symbol[-2] == "T"}
    assert names == {"ladder_abi_version", *abi.SIGNATURES}


def test_default_device_does_not_move_the_outputs():
    weight = torch.randn(37, 53)
    expected = quantize_nf4(weight)
    with torch.device("meta"):
        actual = quantize_nf4(weight)
    for name in ("packed", "absmax", "absmax_scale", "absmax_offset"):
        assert_same_bits(name, getattr(actual, name), getattr(expected, name))
