"""The NF4 products of a GPU: the fused kernel, its epilogues, decoded panels, and the plan that chooses."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import TRITON_DTYPES, TRITON_HALF_DTYPES, assert_close_to_truth, assert_same_bits
from torch import Tensor

from ladder_kernels import NF4Weight, dequantize_nf4, nf4_linear, nf4_swiglu, quantize_nf4, reference
from ladder_kernels.gpu import nf4_linear as gpu
from ladder_kernels.launch import GemmConfig, GpuLinearPlan, gemm_config, gpu_linear_plan, gpu_panel_rows
from ladder_kernels.nf4 import dequantize_rows
from ladder_kernels.panels import panel_linear_dx

pytestmark = pytest.mark.gpu

# (tokens, K, N): aligned, ragged, tiny; one for each configuration, which 1, 32, 64 and 128 tokens lead to.
SHAPES = [(16, 128, 64), (5, 192, 70), (1, 64, 1), (23, 192, 70), (64, 128, 128), (33, 192, 130), (130, 192, 131)]


def weight_of(rows: int, cols: int, device: str, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    return quantize_nf4(torch.randn(rows, cols, device=device), block_size, double_quant)


def run(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    plan: GpuLinearPlan | None = None,
    half_precision: bool = False,
) -> Tensor:
    rows = weight.shape[0]
    size = (x.shape[0], rows, x.shape[1], weight.block_size, x.dtype.itemsize)
    plan = gpu_linear_plan(*size, 86, 1) if plan is None else plan
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=x.device)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    gpu.nf4_linear(x, weight.tensors, bias, residual, plan, scratch, out, half_precision=half_precision)
    return out


def run_pair(x: Tensor, gate: NF4Weight, up: NF4Weight, sm_count: int = 1) -> Tensor:
    plan = gpu_linear_plan(x.shape[0], gate.shape[0], x.shape[1], gate.block_size, 2, 86, sm_count, is_pair=True)
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=x.device)
    out = torch.empty(x.shape[0], gate.shape[0], dtype=x.dtype, device=x.device)
    gpu.nf4_swiglu(x, gate.tensors, up.tensors, plan, scratch, out)
    return out


def split_plan(tokens: int, rows: int, cols: int, splits: int) -> GpuLinearPlan:
    config = gemm_config(tokens, False)
    cols_per_split = -(-cols // (splits * config.block_cols)) * config.block_cols
    splits = -(-cols // cols_per_split)
    return GpuLinearPlan(config, splits, cols_per_split, 0, 4 * splits * tokens * rows if splits > 1 else 0)


@pytest.mark.parametrize("dtype", TRITON_HALF_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [16, 128], ids=["nibbles", "bytes"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_every_byte_decodes_exactly(gpu_device, double_quant, tokens, dtype):
    """One-hot tokens read single weights. Four rows of 128 hold all 256 bytes; each block has its scale."""
    copies, cols = 5, 128
    weight = weight_of(4 * copies, cols, gpu_device, double_quant=double_quant)
    packed = torch.arange(256, dtype=torch.uint8, device=gpu_device).repeat(copies)
    weight = dataclasses.replace(weight, packed=packed)
    if not double_quant:
        scales = torch.tensor([1.0, 0.0, 3e-3, 7.77, 1e-6], device=gpu_device)
        weight = dataclasses.replace(weight, absmax=scales.repeat_interleave(8) * torch.linspace(1, 2, 40).to(scales))
    expected = torch.empty(weight.shape, dtype=dtype, device=gpu_device)
    reference.dequantize_nf4(weight.tensors, 0, expected)
    one_hot = torch.eye(cols, dtype=dtype, device=gpu_device)
    for begin in range(0, cols, tokens):
        out = run(one_hot[begin : begin + tokens].contiguous(), weight)
        # A sum of +0 and -0 is +0.
        assert_same_bits("W^T", out, expected[:, begin : begin + tokens].T.contiguous() + 0.0)


@pytest.mark.parametrize("dtype", TRITON_HALF_DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_truth(gpu_device, shape, double_quant, dtype):
    tokens, cols, rows = shape
    weight = weight_of(rows, cols, gpu_device, double_quant=double_quant)
    x = torch.randn(tokens, cols, device=gpu_device).to(dtype)
    bias = torch.randn(rows, device=gpu_device).to(dtype)
    assert_equals_dense(x, weight, bias)
    if not double_quant:
        assert_equals_dense(x, weight, None)


def assert_equals_dense(x: Tensor, weight: NF4Weight, bias: Tensor | None, **how: object) -> None:
    matrix = dequantize_nf4(weight, x.dtype)
    truth = F.linear(x.double(), matrix.double(), None if bias is None else bias.double())
    assert_close_to_truth("out", run(x, weight, bias, **how), truth, F.linear(x, matrix, bias))


@pytest.mark.parametrize("block_size", [128, 256, 4096])
def test_blocks_that_span_groups_and_rows(gpu_device, block_size):
    x = torch.randn(3, 192, device=gpu_device).half()
    assert_equals_dense(x, weight_of(50, 192, gpu_device, block_size), None)


@pytest.mark.parametrize("dtype", TRITON_HALF_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "splits"), [(3, 2), (20, 3), (1, 16)])
def test_split_columns(gpu_device, tokens, splits, dtype):
    """Partial sums, ragged in tokens, rows and columns; the epilogue moves to the kernel that adds them."""
    rows, cols = 33, 64 * 17
    weight = weight_of(rows, cols, gpu_device)
    x = torch.randn(tokens, cols, device=gpu_device).to(dtype)
    bias, residual = (
        torch.randn(rows, device=gpu_device).to(dtype),
        torch.randn(tokens, rows, device=gpu_device).to(dtype),
    )
    plan = split_plan(tokens, rows, cols, splits)
    assert plan.splits > 1
    assert_equals_dense(x, weight, bias, plan=plan)
    alone = run(x, weight, bias, plan=plan)
    assert_same_bits("with residual", run(x, weight, bias, residual, plan=plan), residual + alone)
    assert_same_bits("again", run(x, weight, bias, plan=plan), alone)


def test_residual_is_added_to_the_rounded_product_and_may_be_the_result(gpu_device):
    weight = weight_of(70, 128, gpu_device)
    x, residual = (torch.randn(5, size, device=gpu_device).half() for size in (128, 70))
    expected = residual + run(x, weight)
    assert_same_bits("out", run(x, weight, None, residual), expected)
    plan = gpu_linear_plan(5, 70, 128, 64, 2, 86, 1)
    gpu.nf4_linear(x, weight.tensors, None, residual, plan, x.new_empty(0, dtype=torch.uint8), residual)
    assert_same_bits("in place", residual, expected)


@pytest.mark.parametrize("dtype", TRITON_HALF_DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    ("shape", "sm_count"),
    [((5, 192, 70), 1), ((2, 1088, 33), 2), ((20, 192, 33), 1), ((40, 128, 65), 1), ((70, 192, 70), 1)],
)
def test_swiglu_of_a_pair(gpu_device, shape, sm_count, double_quant, dtype):
    tokens, cols, rows = shape
    gate, up = (weight_of(rows, cols, gpu_device, double_quant=double_quant) for _ in range(2))
    x = torch.randn(tokens, cols, device=gpu_device).to(dtype) / cols**0.5
    matrices = [dequantize_nf4(weight, dtype) for weight in (gate, up)]
    truth = F.silu(x.double() @ matrices[0].double().T) * (x.double() @ matrices[1].double().T)
    plain = reference.swiglu(x @ matrices[0].T, x @ matrices[1].T)
    assert_close_to_truth("out", run_pair(x, gate, up, sm_count), truth, plain)


@pytest.mark.parametrize("tokens", [3, 70])
def test_half_precision_sums_hold_a_tile_only(gpu_device, tokens):
    """Running sums of 96,000 would be infinite in fp16; each tile's is not, nor is the result."""
    rows, cols = 5, 384
    ones = torch.ones(rows, cols, device=gpu_device)
    weight = quantize_nf4(ones, 64, double_quant=False)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0], device=gpu_device).repeat_interleave(64)
    x = (500 * signs).half().expand(tokens, cols).contiguous()
    out = run(x, weight, half_precision=True)
    assert_same_bits("out", out, torch.full_like(out, 32000.0))
    weight, x = weight_of(rows, cols, gpu_device), torch.randn(tokens, cols, device=gpu_device).half()
    full = run(x, weight)
    assert float((run(x, weight, half_precision=True).float() - full.float()).abs().max()) < 0.1


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("panel_rows", [1, 7, 32, 70, 100])
def test_panels(gpu_device, panel_rows, dtype):
    tokens, rows, cols = 6, 70, 96
    weight = weight_of(rows, cols, gpu_device)
    panel_rows = min(panel_rows, rows)
    count = min(2, -(-rows // panel_rows))
    plan = GpuLinearPlan(None, 1, cols, panel_rows, count * panel_rows * cols * dtype.itemsize)
    x, bias = torch.randn(tokens, cols, device=gpu_device).to(dtype), torch.randn(rows, device=gpu_device).to(dtype)
    assert_equals_dense(x, weight, bias, plan=plan)
    alone, residual = run(x, weight, plan=plan), torch.randn(tokens, rows, device=gpu_device).to(dtype)
    assert_same_bits("with residual", run(x, weight, None, residual, plan=plan), residual + alone)

    dy = torch.randn(tokens, rows, device=gpu_device).to(dtype)
    matrix = dequantize_nf4(weight, dtype)
    panels, dx = torch.empty(count, panel_rows, cols, dtype=dtype, device=gpu_device), torch.empty_like(x)
    sums = torch.full((tokens, cols), float("nan"), device=gpu_device)
    panel_linear_dx(dy, partial(dequantize_rows, weight.tensors), panels, sums, dx)
    assert_close_to_truth("dx", dx, dy.double() @ matrix.double(), dy @ matrix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are CUDA's")
def test_panels_are_captured_in_a_graph(gpu_device):
    weight = weight_of(300, 128, gpu_device)
    x = torch.randn(40, 128, device=gpu_device).half()
    plan = GpuLinearPlan(None, 1, 128, 64, 2 * 64 * 128 * 2)
    expected = run(x, weight, plan=plan)
    graph, scratch = torch.cuda.CUDAGraph(), torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=gpu_device)
    out = torch.empty_like(expected)
    with torch.cuda.graph(graph):
        gpu.nf4_linear(x, weight.tensors, None, None, plan, scratch, out)
    out.zero_()
    graph.replay()
    assert_same_bits("replayed", out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_public_epilogues_are_the_unfused_ops(gpu_device, dtype):
    gate, up = weight_of(37, 128, gpu_device), weight_of(37, 128, gpu_device)
    x, residual = torch.randn(5, 128, device=gpu_device).to(dtype), torch.randn(5, 37, device=gpu_device).to(dtype)
    bias, before = torch.randn(37, device=gpu_device).to(dtype), residual.clone()
    assert_same_bits("residual", nf4_linear(x, gate, bias, residual), residual + nf4_linear(x, gate, bias))
    assert_same_bits("untouched", residual, before)
    expected = reference.swiglu(nf4_linear(x, gate), nf4_linear(x, up))
    atol = 0.0 if gpu_device == "cpu" and dtype != torch.float32 else 0.02
    assert float((nf4_swiglu(x, gate, up).float() - expected.float()).abs().max()) <= atol
    with pytest.raises(ValueError, match=r"expected residual of shape \[5, 37\], got \[5, 36\]"):
        nf4_linear(x, gate, None, residual[:, 1:])
    with pytest.raises(ValueError, match=r"nf4_swiglu: expected up_weight of shape \(37, 128\), got \(36, 128\)"):
        nf4_swiglu(x, gate, weight_of(36, 128, gpu_device))


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 103, 120])
def test_plan_by_tokens(architecture):
    def config(tokens: int, **size: int) -> GemmConfig | None:
        size = {"rows": 3584, "cols": 3584, "block_size": 64, "itemsize": 2} | size
        return gpu_linear_plan(tokens, **size, architecture=architecture, sm_count=46).config

    crossover = {75: 0, 80: 128, 86: 1024, 89: 1024, 120: 1024}.get(architecture, 64)
    for tokens in (1, 16, 17, 64, 65, 128, 129, 1024, 1025, 8192):
        assert config(tokens) == (gemm_config(tokens, False) if tokens <= crossover else None)
    for unfit in ({"itemsize": 4}, {"cols": 3584 + 32}, {"block_size": 32}, {"rows": 0}, {"cols": 0}):
        assert config(1, **unfit) is None


def test_plan_details():
    size = (3584, 3584, 64, 2)
    # 56 tiles of 64 rows: 3 times fit into 4 x 46 thread blocks, 9 times into 4 x 132, but 512 columns are the least.
    assert gpu_linear_plan(1, *size, 89, 46)[1:] == (3, 1280, 0, 3 * 4 * 3584)
    assert gpu_linear_plan(1, *size, 90, 132)[1:] == (7, 512, 0, 7 * 4 * 3584)
    assert gpu_linear_plan(1, *size, 90, 132, is_pair=True)[1:] == (4, 896, 0, 4 * 2 * 4 * 3584)
    assert gpu_linear_plan(512, *size, 89, 46)[1:] == (1, 3584, 0, 0)
    # fp16 sums are worth the fused kernel always where they double the rate, and nowhere else.
    assert gpu_linear_plan(8192, *size, 89, 46, half_precision=True).config == gemm_config(8192, False)
    assert gpu_linear_plan(8192, *size, 90, 132, half_precision=True).config is None
    assert gpu_linear_plan(2048, *size, 75, 40).scratch_bytes == 3584 * 3584 * 2


@pytest.mark.parametrize("tokens", [1, 129, 2048, 8192])
@pytest.mark.parametrize("shape", [(1, 1), (3584, 3584), (18944, 3584), (3584, 18944), (152064, 3584)], ids=str)
@pytest.mark.parametrize(("architecture", "sm_count"), [(75, 40), (86, 28), (89, 46), (90, 132), (120, 170)])
def test_gpu_panel_rows(tokens, shape, architecture, sm_count):
    rows, cols = shape
    step = gpu_panel_rows(tokens, rows, cols, 2, architecture, sm_count)
    assert 1 <= step <= rows
    assert step == rows or step % 64 == 0
    assert step * cols * 2 <= 32 << 20
    assert gpu_linear_plan(tokens, rows, 97, 64, 2, architecture, sm_count).panel_rows >= 1


def test_whole_waves_of_tiles():
    assert gpu_panel_rows(2048, 18944, 3584, 2, 90, 132) == 2048  # 8 x 16 tiles of 132
