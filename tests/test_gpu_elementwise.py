"""The Triton passes of rms_norm, rotary and swiglu: on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from numerics import TRITON_DTYPES, assert_close_to_truth, assert_same_bits
from test_elementwise import OPS, arguments

from ladder_kernels import reference, rms_norm, rotary, swiglu, swiglu_

triton = pytest.importorskip("triton")
gpu = pytest.importorskip("ladder_kernels.gpu.elementwise")

pytestmark = pytest.mark.gpu

# Arithmetic in bf16 is wrong in the interpreter.
# (T, heads, head size): aligned, ragged, tiny, empty, wider than one tile of swiglu and rotary
SHAPES = [(16, 4, 32), (7, 3, 22), (1, 1, 2), (0, 2, 8), (2, 33, 128)]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ladder_kernels.elementwise.uses_triton", lambda *_: True)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_close_to_truth(gpu_device, name, shape, dtype):
    op, plain = OPS[name]
    given = [tensor.to(gpu_device) for tensor in arguments(name, shape, dtype)]
    truth = plain(*(tensor.double() for tensor in given))
    out = op(*given)
    assert out.dtype == dtype and out.shape == given[0].shape and out.is_contiguous()
    assert_close_to_truth(name, out, truth, plain(*given))
    if name == "rotary":
        assert_same_bits(name, out, plain(*given))


def test_rows_of_a_wider_matrix(gpu_device):
    """Queries and keys are columns of one product, as gate and up are."""
    both = torch.randn(5, 48, device=gpu_device)
    gate, up = both.chunk(2, dim=-1)
    assert_same_bits("swiglu", swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    assert_same_bits("norm", rms_norm(gate, up[0], 1e-5), rms_norm(gate.contiguous(), up[0].contiguous(), 1e-5))
    heads = both.unflatten(-1, (6, 8))[:, 1:4]
    tables = torch.randn(5, 8, device=gpu_device), torch.randn(5, 8, device=gpu_device)
    assert_same_bits("rotary", rotary(heads, *tables), rotary(heads.contiguous(), *tables))


def test_norm_of_heads_and_of_rows_beyond_the_registers(gpu_device, monkeypatch):
    x, weight = torch.randn(3, 5, 64, device=gpu_device), torch.randn(64, device=gpu_device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(gpu, "MAX_NORM_WIDTH", 63)
    assert_same_bits("wide", rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_swiglu_into_its_gate(gpu_device):
    gate, up = torch.randn(2, 7, 33, device=gpu_device)
    gate, expected = gate.clone(), swiglu(gate, up)
    version = gate._version
    assert swiglu_(gate, up) is gate
    assert_same_bits("gate", gate, expected)
    assert gate._version > version
    buffer = torch.full((4, 33), 7.0, device=gpu_device)
    gpu.swiglu(up[:2], up[2:4], buffer[1:3])
    assert bool((buffer[0] == 7.0).all()) and bool((buffer[3] == 7.0).all())


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 90.0, -90.0, 1e30, -1e30, torch.inf, torch.nan])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, under the interpreter
def test_silu_over_the_whole_range(gpu_device, value):
    gate, up = torch.full((2, 40), value, device=gpu_device), torch.ones(2, 40, device=gpu_device)
    truth = reference.swiglu(gate.double(), up.double())
    assert torch.allclose(swiglu(gate, up).double(), truth, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_tiles():
    assert gpu.norm_tile(3584) == (1, 4096, 8)
    assert gpu.norm_tile(128) == (16, 128, 4)
    assert gpu.norm_tile(16384) == (1, 16384, 32)
    assert gpu.rotary_tile(28, 64) == (32, 64, 4)
    assert gpu.rotary_tile(64, 64) == (32, 64, 4)
    assert gpu.rotary_tile(3, 11) == (4, 16, 1)
    assert gpu.swiglu_tile(18944) == (1, 2048, 4)
    assert gpu.swiglu_tile(33) == (32, 64, 4)
