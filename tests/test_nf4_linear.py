"""nf4_linear: the product with a decoded matrix, panel by panel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth, assert_same_bits

from ladder_kernels import (
    NF4Weight,
    Workspace,
    dequantize_nf4,
    launch,
    native,
    nf4_linear,
    nf4_swiglu,
    quantize_nf4,
    swiglu,
)
from ladder_kernels.launch import PANEL_ROW_MULTIPLE, LinearPlan, linear_plan, panel_rows
from ladder_kernels.reference import BLOCK_SIZES

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
    assert_equals_dense(x, weight, bias)


@pytest.mark.parametrize("tokens", [*range(1, 8), 31, 32, 33, 65])
def test_panels_do_not_change_the_product(implementation, tokens, monkeypatch):
    weight = quantize_nf4(torch.randn(333, 77))
    x, bias = torch.randn(tokens, 77), torch.randn(333)
    matrix = dequantize_nf4(weight, torch.float32)
    truth, plain = F.linear(x.double(), matrix.double(), bias.double()), F.linear(x, matrix, bias)
    for size in (1, 7, 64, 333):
        monkeypatch.setattr(launch, "panel_rows", lambda *_, size=size: size)
        assert_close_to_truth(f"panels of {size}", nf4_linear(x, weight, bias), truth, plain)


def assert_equals_dense(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None) -> None:
    matrix = dequantize_nf4(weight, x.dtype)
    truth = F.linear(x.double(), matrix.double(), None if bias is None else bias.double())
    assert_close_to_truth("out", nf4_linear(x, weight, bias), truth, F.linear(x, matrix, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [*range(1, 18), 24, 31, 32, 33])
def test_few_tokens_and_the_first_many(implementation, tokens, dtype):
    """Every number of tokens that the kernel divides among its tiles in another way, and both sides of the switch."""
    weight = quantize_nf4(torch.randn(37, 192, dtype=dtype))
    assert_equals_dense(torch.randn(tokens, 192, dtype=dtype), weight, torch.randn(37, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    tokens=st.integers(1, 34),
    groups=st.integers(1, 9),
    rows=st.integers(1, 70),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
    scale=st.sampled_from([1.0, 1e-3, 50.0]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_few_tokens_of_any_shape(
    implementation, dtype, tokens, groups, rows, block_size, double_quant, with_bias, scale
):
    weight = quantize_nf4(torch.randn(rows, 64 * groups, dtype=dtype) * scale, block_size, double_quant)
    bias = torch.randn(rows, dtype=dtype) if with_bias else None
    # Results of about 1, so that luck with the last bit of a single large one is within the absolute tolerance.
    x = torch.randn(tokens, 64 * groups) / (scale * (64 * groups) ** 0.5)
    assert_equals_dense(x.to(dtype), weight, bias)


def test_more_groups_than_scales_decoded_ahead(implementation):
    weight = quantize_nf4(torch.randn(5, 64 * 300))
    assert_equals_dense(torch.randn(3, 64 * 300), weight, None)


def test_each_code_reaches_its_column(implementation):
    """One-hot tokens read single weights, so a wrong place in the order of x shows as a wrong number, exactly."""
    weight = quantize_nf4(torch.randn(3, 128))
    matrix = dequantize_nf4(weight, torch.float32)
    for column in range(128):
        x = torch.zeros(2, 128)
        x[1, column] = 1.0
        out = nf4_linear(x, weight)
        assert_same_bits(f"column {column}", out[1], matrix[:, column])
        assert bool((out[0] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 65])
def test_wide_products_in_parts(implementation, dtype, tokens, monkeypatch):
    monkeypatch.setattr(launch, "WIDE_TOKENS", 16)
    monkeypatch.setattr(launch, "panel_rows", lambda *_: 31)
    weight = quantize_nf4(torch.randn(77, 100, dtype=dtype))
    assert_equals_dense(torch.randn(100, tokens, dtype=dtype).T, weight, torch.randn(77, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 5, 16, 31])
def test_few_tokens_write_out_and_nothing_beside_it(native_isa, tokens):
    rows, cols, guard = 19, 128, 64
    weight, x = quantize_nf4(torch.randn(rows, cols)), torch.randn(tokens, cols)
    size = linear_plan(tokens, rows, cols, 64, 4, "avx512").scratch_bytes
    scratch = torch.full((size + 2 * guard,), 77, dtype=torch.uint8)
    buffer = torch.full((tokens * rows + 2 * guard,), 123.0)
    out = buffer[guard:-guard].view(tokens, rows)
    expected = torch.empty(tokens, rows)
    native.nf4_linear(x, None, None, weight.tensors, torch.empty(size, dtype=torch.uint8), expected)
    native.nf4_linear(x, None, None, weight.tensors, scratch[guard:-guard], out)
    assert_same_bits("out", out, expected)
    for edge in (buffer[:guard] == 123.0, buffer[-guard:] == 123.0, scratch[:guard] == 77, scratch[-guard:] == 77):
        assert bool(edge.all())


def test_strided_x_and_bias(implementation):
    """Not to the bit: plain torch's product of a transposed x sums in another order on some CPUs."""
    weight, bias = quantize_nf4(torch.randn(9, 64)), torch.randn(18)[::2]
    for x in (torch.randn(64, 4).T, torch.randn(4, 128)[:, ::2], torch.randn(1, 64).expand(3, 64)):
        assert_equals_dense(x, weight, bias)


def test_linear_plan():
    assert linear_plan(1, 300, 128, 64, 4, isa="avx512") == LinearPlan(None, 16 * 128 * 4)
    assert linear_plan(16, 300, 128, 4096, 2, isa="avx512") == LinearPlan(None, 16 * 128 * 4)
    for tokens, cols, block_size, isa in (
        (33, 128, 64, "amx"),
        (33, 128, 64, "avx512bf16"),
        (3, 128, 64, "scalar"),
        (1, 96, 64, "amx"),
        (1, 128, 32, "amx"),
        (1, 128, 64, None),
        (0, 128, 64, "avx512"),
    ):
        assert linear_plan(tokens, 300, cols, block_size, 2, isa) == LinearPlan(300, 300 * cols * 2)
    for tokens, isa in ((33, "avx512"), (17, "avx2")):
        assert linear_plan(tokens, 300, 128, 64, 4, isa) == LinearPlan(300, 300 * 128 * 4)
        scratch = 4 * (300 * 128 + 128 * tokens) + -(-4 * 300 * tokens // 64) * 64
        assert linear_plan(tokens, 300, 128, 64, 2, isa) == LinearPlan(300, scratch, wide_tokens=tokens)
    assert linear_plan(2048, 300, 128, 64, 2, "avx512").wide_tokens == launch.WIDE_TOKENS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_residual_is_added_to_the_rounded_result(implementation, dtype, tokens):
    weight, x = quantize_nf4(torch.randn(70, 128, dtype=dtype)), torch.randn(2, tokens, 128, dtype=dtype)
    bias, residual = torch.randn(70, dtype=dtype), torch.randn(70, tokens, 2, dtype=dtype).permute(2, 1, 0)
    before = residual.clone()
    out = nf4_linear(x, weight, bias, residual)
    assert_same_bits("out", out, residual + nf4_linear(x, weight, bias))
    assert_same_bits("residual", residual, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_swiglu_of_two_products(implementation, dtype, tokens):
    gate, up = (quantize_nf4(torch.randn(70, 128, dtype=dtype)) for _ in range(2))
    x, workspace = torch.randn(tokens, 128, dtype=dtype), Workspace()
    expected = swiglu(nf4_linear(x, gate), nf4_linear(x, up))
    assert_same_bits("out", nf4_swiglu(x, gate, up, workspace=workspace), expected)


def test_no_columns_at_all():
    codebook = quantize_nf4(torch.ones(1, 64)).codebook
    empty = NF4Weight(torch.empty(0, dtype=torch.uint8), torch.empty(0), codebook, (5, 0), torch.float32)
    for shape in ((3, 0), (2, 3, 0), (0,)):
        assert_same_bits("out", nf4_linear(torch.empty(shape), empty), torch.zeros(*shape[:-1], 5))


def test_leading_dimensions():
    weight = quantize_nf4(torch.randn(5, 8))
    x = torch.randn(2, 3, 8)
    out = nf4_linear(x, weight)
    assert out.shape == (2, 3, 5)
    assert torch.equal(out.view(6, 5), nf4_linear(x.view(6, 8), weight))
    assert nf4_linear(x[0, 0], weight).shape == (5,)
    assert nf4_linear(x[:0], weight).shape == (0, 3, 5)
    assert_same_bits("out", nf4_linear(x.transpose(0, 1), weight), out.transpose(0, 1))


def test_workspace_is_filled_once_and_bounds_the_panel():
    weight, workspace = quantize_nf4(torch.randn(130, 64)), Workspace()
    nf4_linear(torch.randn(40, 64), weight, workspace=workspace)
    held = workspace.nbytes
    pointer = workspace.take("nf4_linear", (1,), torch.float32).data_ptr()
    for tokens in (40, 1):
        nf4_linear(torch.randn(tokens, 64), weight, workspace=workspace)
        assert workspace.nbytes == held == 130 * 64 * 4
        assert workspace.take("nf4_linear", (1,), torch.float32).data_ptr() == pointer


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
    with pytest.raises(ValueError, match=r"nf4_linear: bias requires a gradient.*torch\.no_grad"):
        nf4_linear(x.detach(), weight, bias)


@pytest.mark.parametrize("tokens", [0, 1, 4, 100])
@pytest.mark.parametrize("cols", [64, 100])
def test_no_rows_at_all(implementation, tokens, cols):
    codebook = quantize_nf4(torch.ones(1, 64)).codebook
    empty = NF4Weight(torch.empty(0, dtype=torch.uint8), torch.empty(0), codebook, (0, cols), torch.float32)
    assert nf4_linear(torch.randn(tokens, cols), empty).shape == (tokens, 0)


def test_compiles_as_one_graph():
    """In a process of its own, for the other tests run with the compiler off."""
    code = """
import torch
from ladder_kernels import nf4_linear, nf4_swiglu, quantize_nf4
weight = quantize_nf4(torch.randn(70, 128))
for tokens in (3, 50):
    x = torch.randn(tokens, 128)
    compiled = torch.compile(lambda x: nf4_linear(x * 2, weight), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), nf4_linear(x * 2, weight))
    residual = torch.randn(tokens, 70)
    fused = torch.compile(
        lambda x: nf4_linear(x, weight, None, residual) * nf4_swiglu(x, weight, weight), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        expected = nf4_linear(x, weight, None, residual) * nf4_swiglu(x, weight, weight)
        assert torch.allclose(fused(x), expected)
"""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


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
    with pytest.raises(ValueError, match=r"expected residual of shape \[3, 5\], got \[3, 4\]"):
        nf4_linear(torch.randn(3, 8), weight, None, torch.randn(3, 4))
    with pytest.raises(TypeError, match="expected residual in float32, got bfloat16"):
        nf4_linear(torch.randn(3, 8), weight, None, torch.randn(3, 5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"nf4_linear: residual requires a gradient.*torch\.no_grad"):
        nf4_linear(torch.randn(3, 8), weight, None, torch.randn(3, 5, requires_grad=True))
    with pytest.raises(ValueError, match=r"nf4_swiglu: expected up_weight of shape \(5, 8\), got \(6, 8\)"):
        nf4_swiglu(torch.randn(3, 8), weight, quantize_nf4(torch.randn(6, 8)))
    with pytest.raises(ValueError, match=r"nf4_swiglu: expected x of shape \[T, 8\], got \[8\]"):
        nf4_swiglu(torch.randn(8), weight, weight)
