"""nf4_linear: the product with a decoded matrix, panel by panel."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_truth

from ladder_kernels import Workspace, dequantize_nf4, nf4_linear, quantize_nf4
from ladder_kernels.launch import PANEL_ROW_MULTIPLE, panel_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows of x, K, N): aligned, ragged, tiny, decoding one token
SHAPES = [(64, 128, 192), (33, 97, 71), (1, 1, 1), (1, 256, 300)]


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_truth(implementation, shape, dtype, with_bias):
    tokens, cols, rows = shape
    weight = quantize_nf4(torch.randn(rows, cols, dtype=dtype))
    x = torch.randn(tokens, cols, dtype=dtype)
    bias = torch.randn(rows, dtype=dtype) if with_bias else None
    matrix = dequantize_nf4(weight, dtype)
    truth = F.linear(x.double(), matrix.double(), None if bias is None else bias.double())
    assert_close_to_truth("out", nf4_linear(x, weight, bias), truth, F.linear(x, matrix, bias))


@pytest.mark.parametrize("tokens", [*range(1, 8), 31, 32, 33, 65])
def test_panels_do_not_change_the_product(implementation, tokens, monkeypatch):
    weight = quantize_nf4(torch.randn(333, 77))
    x, bias = torch.randn(tokens, 77), torch.randn(333)
    matrix = dequantize_nf4(weight, torch.float32)
    truth, plain = F.linear(x.double(), matrix.double(), bias.double()), F.linear(x, matrix, bias)
    for size in (1, 7, 64, 333):
        # The package's attribute of this name is the function, not the module.
        module = sys.modules["ladder_kernels.nf4_linear"]
        monkeypatch.setattr(module, "panel_rows", lambda *_, size=size: size)
        assert_close_to_truth(f"panels of {size}", nf4_linear(x, weight, bias), truth, plain)


def test_leading_dimensions():
    weight = quantize_nf4(torch.randn(5, 8))
    x = torch.randn(2, 3, 8)
    out = nf4_linear(x, weight)
    assert out.shape == (2, 3, 5)
    assert torch.equal(out.view(6, 5), nf4_linear(x.view(6, 8), weight))
    assert nf4_linear(x[0, 0], weight).shape == (5,)
    assert nf4_linear(x[:0], weight).shape == (0, 3, 5)
    assert torch.allclose(nf4_linear(x.transpose(0, 1), weight), out.transpose(0, 1))


def test_workspace_is_filled_once_and_bounds_the_panel():
    weight, workspace = quantize_nf4(torch.randn(130, 64)), Workspace()
    nf4_linear(torch.randn(3, 64), weight, workspace=workspace)
    held = workspace.nbytes
    pointer = workspace.take("nf4_panel", (1,), torch.float32).data_ptr()
    nf4_linear(torch.randn(3, 64), weight, workspace=workspace)
    assert workspace.nbytes == held == 130 * 64 * 4
    assert workspace.take("nf4_panel", (1,), torch.float32).data_ptr() == pointer


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("shape", [(1, 1), (896, 4864), (3584, 18944), (18944, 3584), (152064, 3584)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_panel_rows(tokens, shape, itemsize):
    rows, cols = shape
    step = panel_rows(tokens, rows, cols, itemsize)
    assert 1 <= step <= rows
    assert step == rows or step % PANEL_ROW_MULTIPLE == 0
    budget = (1 if tokens == 1 else 32) << 20
    assert step * cols * itemsize <= budget + PANEL_ROW_MULTIPLE * cols * itemsize


def test_gradient_is_refused_and_no_grad_accepts_parameters():
    weight = quantize_nf4(torch.randn(5, 8))
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"nf4_linear: x requires a gradient.*torch\.no_grad"):
        nf4_linear(x, weight)
    bias = torch.nn.Parameter(torch.randn(5))
    with torch.no_grad():
        assert not nf4_linear(x, weight, bias).requires_grad
    assert not nf4_linear(x.detach(), weight, bias).requires_grad


def test_wrong_arguments():
    weight = quantize_nf4(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 8\], got \[3, 7\]"):
        nf4_linear(torch.randn(3, 7), weight)
    with pytest.raises(TypeError, match="expected x in float32, bfloat16 or float16, got float64"):
        nf4_linear(torch.randn(3, 8, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match=r"expected bias of shape \[5\], got \[4\]"):
        nf4_linear(torch.randn(3, 8), weight, torch.randn(4))
    with pytest.raises(TypeError, match="expected bias in float32, got bfloat16"):
        nf4_linear(torch.randn(3, 8), weight, torch.randn(5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected x on cpu, got meta"):
        nf4_linear(torch.randn(3, 8, device="meta"), weight)
