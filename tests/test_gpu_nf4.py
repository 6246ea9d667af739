"""The Triton kernels of NF4 against plain torch on a CPU, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import TRITON_DTYPES, assert_same_bits
from torch import Tensor

from ladder_kernels import native, quantize_nf4, reference
from ladder_kernels.nf4 import NF4_CODES, _kernels, dynamic_map
from ladder_kernels.nf4_tensors import NF4Tensors
from ladder_kernels.reference import BLOCK_SIZES

gpu_nf4 = pytest.importorskip("ladder_kernels.gpu.nf4", reason="needs Triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),  # of the interpreter
]

# Triton's interpreter rounds to bf16 wrongly; it does read it.
THRESHOLDS = (torch.tensor(NF4_CODES)[:-1] + torch.tensor(NF4_CODES)[1:]) / 2


def on(device: str, nf4: NF4Tensors) -> NF4Tensors:
    return NF4Tensors(*(value.to(device) if isinstance(value, Tensor) else value for value in nf4))


def assert_decodes(nf4: NF4Tensors, device: str, dtype: torch.dtype, first_row: int, shape: tuple[int, int]) -> None:
    """Same bits as the reference, and nothing written beside them."""
    expected = torch.empty(shape, dtype=dtype)
    reference.dequantize_nf4(nf4, first_row, expected)
    guard, size = 64, expected.numel()
    buffer = torch.full((guard + size + guard,), 123.0, dtype=dtype, device=device)
    out = buffer[guard : guard + size].view(shape)
    gpu_nf4.dequantize_nf4(on(device, nf4), first_row, out)
    assert_same_bits("out", out.cpu(), expected)
    assert bool((buffer[:guard] == 123.0).all()) and bool((buffer[guard + size :] == 123.0).all())


def assert_encodes(weight: Tensor, device: str, block_size: int = 64) -> None:
    packed, absmax = gpu_nf4.quantize_nf4(weight.to(device), THRESHOLDS.to(device), block_size)
    expected_packed, expected_absmax = reference.quantize_nf4(weight, THRESHOLDS, block_size)
    assert_same_bits("absmax", absmax.cpu(), expected_absmax)
    assert_same_bits("packed", packed.cpu(), expected_packed)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 384), (131, 200), (37, 67), (3, 1), (1, 8)], ids=str)
def test_decode(gpu_device, dtype, double_quant, shape):
    nf4 = quantize_nf4(torch.randn(shape) * torch.rand(shape[0], 1), double_quant=double_quant).tensors
    for first_row in {0, 1, shape[0] // 2, shape[0] - 1} - {shape[0]}:
        assert_decodes(nf4, gpu_device, dtype, first_row, (shape[0] - first_row, shape[1]))


@pytest.mark.parametrize("cols", [96, 50])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_decode_every_block_size_from_the_middle_of_a_block(gpu_device, block_size, cols):
    nf4 = quantize_nf4(torch.randn(140, cols), block_size).tensors
    assert_decodes(nf4, gpu_device, torch.float16, 3, (130, cols))


def test_decode_past_the_first_group_of_nested_scales(gpu_device):
    nf4 = quantize_nf4(torch.randn(520, 64) * torch.rand(520, 1), 64).tensors
    assert_decodes(nf4, gpu_device, torch.float32, 200, (320, 64))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_decode_every_byte(gpu_device, dtype):
    packed = torch.arange(256, dtype=torch.uint8)
    for scale in (1.0, 0.0, 3.3e-7, 1e5, -2.7, float("inf"), float("nan")):
        absmax = torch.tensor([scale] * 8) * torch.linspace(0.5, 1, 8)
        nf4 = NF4Tensors(packed, absmax, torch.tensor(NF4_CODES), None, None, None, 64)
        assert_decodes(nf4, gpu_device, dtype, 0, (8, 64))


def test_decode_every_nested_scale(gpu_device):
    codes = torch.arange(256, dtype=torch.uint8)
    packed = torch.randint(256, (256 * 32,), dtype=torch.uint8)
    tensors = (torch.tensor(NF4_CODES), torch.rand(1) * 3, dynamic_map(), torch.tensor(0.731), 64)
    assert_decodes(NF4Tensors(packed, codes, *tensors), gpu_device, torch.float32, 0, (256, 64))


def test_decode_misaligned_codes(gpu_device):
    nf4 = quantize_nf4(torch.randn(16, 64)).tensors
    for offset in (1, 2, 4):
        moved = torch.cat((torch.zeros(offset, dtype=torch.uint8), nf4.packed)).to(gpu_device)[offset:]
        out = torch.empty(16, 64, dtype=torch.float16, device=gpu_device)
        gpu_nf4.dequantize_nf4(on(gpu_device, nf4)._replace(packed=moved), 0, out)
        expected = torch.empty(16, 64, dtype=torch.float16)
        reference.dequantize_nf4(nf4, 0, expected)
        assert_same_bits("out", out.cpu(), expected)


def test_decode_no_rows(gpu_device):
    nf4 = quantize_nf4(torch.randn(16, 64)).tensors
    gpu_nf4.dequantize_nf4(on(gpu_device, nf4), 4, torch.empty(0, 64, device=gpu_device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (37, 67), (1, 1), (5, 64)], ids=str)
def test_encode(gpu_device, dtype, shape):
    assert_encodes((torch.randn(shape) * torch.rand(shape[0], 1) * 3).to(dtype), gpu_device)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_encode_every_block_size(gpu_device, block_size):
    assert_encodes(torch.randn(2, 4096 + 77), gpu_device, block_size)


def test_encode_ties_and_thresholds(gpu_device):
    infinity = torch.tensor(torch.inf)
    codes = torch.tensor(NF4_CODES)
    neighbours = [torch.nextafter(THRESHOLDS, infinity), torch.nextafter(THRESHOLDS, -infinity)]
    assert_encodes(torch.cat([codes, THRESHOLDS, *neighbours, torch.ones(3)])[None], gpu_device)


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 1e-38, 3e38])
@pytest.mark.parametrize("first", [64, 192], ids=["full", "partial"])
def test_encode_special_blocks(gpu_device, special, first):
    weight = torch.randn(3, 70)
    weight.view(-1)[first : first + 18] = special
    assert_encodes(weight, gpu_device)
    weight.view(-1)[first : first + 64] = special
    assert_encodes(weight, gpu_device)


@pytest.mark.parametrize("count", [1, 300, 1024, 2600])
def test_encode_scales(gpu_device, count):
    absmax = torch.cat([torch.linspace(0.001, 4, count), torch.logspace(-6, 0, 256)])[:count]
    if count > 1024:
        absmax[700], absmax[1100], absmax[1536:1792] = torch.nan, torch.inf, absmax.nan_to_num().mean()
    offset = torch.nan_to_num(absmax, 0.5, 0.5).mean()
    if count > 1024:
        absmax[1536:1792] = offset
    expected = reference.quantize_absmax(absmax, dynamic_map(), offset)
    actual = gpu_nf4.quantize_absmax(*(tensor.to(gpu_device) for tensor in (absmax, dynamic_map(), offset)))
    for name, ours, theirs in zip(("codes", "scale"), actual, expected, strict=True):
        assert_same_bits(name, ours.cpu(), theirs)


def test_config_takes_whole_words_where_everything_is_aligned():
    assert gpu_nf4.dequantize_config(0, 1 << 20, 256, 2).lane == 8
    assert gpu_nf4.dequantize_config(8, 4096, 4, 2).lane == 8
    assert gpu_nf4.dequantize_config(4, 4100, 2, 4).lane == 4
    for first, count, address in ((4, 4096, 0), (0, 4100, 0), (0, 4096, 2)):
        assert gpu_nf4.dequantize_config(first, count, address, 2).lane == 0


def test_quantize_config_keeps_the_tile():
    assert {gpu_nf4.quantize_config(size).blocks * size for size in BLOCK_SIZES} == {4096}


def test_specs_are_unique_and_complete():
    specs = list(gpu_nf4.specs())
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert set(spec.types) | set(spec.constants) == set(spec.kernel.arg_names), spec.name


def test_dispatch(monkeypatch):
    on_gpu: Any = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.bfloat16)
    assert _kernels(on_gpu) is gpu_nf4
    assert _kernels(torch.empty(0, device="meta")) is reference
    monkeypatch.setattr(native, "available", lambda: False)
    assert _kernels(torch.empty(0)) is reference
    # Where Triton has no wheel, plain torch computes on the GPU.
    monkeypatch.setattr("ladder_kernels.dispatch._has_triton", lambda: False)
    assert _kernels(on_gpu) is reference
