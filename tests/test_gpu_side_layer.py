"""Kernels of the side layer: in Triton's interpreter without a GPU, on the hardware with one."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor

from ladder_kernels import SideLayerWeights, side_layer
from ladder_kernels.gpu import side_layer as gpu
from ladder_kernels.gpu.side_config import FUSED_SIDE_DIM
from ladder_kernels.side_layer import SideLayerShape, _plain_backward

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
# S, Hq, Hkv, d, F and the documents: aligned, ragged, tiny, and wider than one program's rows.
SHAPES = {
    "aligned": ((64, 2, 1, 32, 96), (64,)),
    "ragged": ((40, 3, 3, 16, 52), (17, 1, 23)),
    "tiny": ((8, 1, 1, 8, 4), (1,)),
    "wide": ((416, 2, 1, 64, 72), (9, 9)),
}
NAMES = ("state", *SideLayerWeights._fields)


@pytest.fixture
def gpu_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor], SideLayerShape]:
    """State and fp32 weights, the rotary tables, and the shape."""
    (width, heads, kv_heads, head_dim, inner), lengths = SHAPES[name]
    tokens, mixed = sum(lengths), heads * head_dim
    matrices = [((heads + 2 * kv_heads) * head_dim, width), (width, mixed), (2 * inner, width), (width, inner)]
    qkv, attention_out, gate_up, mlp_out = (torch.randn(shape) * shape[1] ** -0.5 for shape in matrices)
    norms = [1 + 0.1 * torch.randn(width) for _ in range(2)]
    state = torch.randn(tokens, width).to(dtype)
    angles = torch.randn(tokens, head_dim // 2).repeat(1, 2)
    tensors = [state, norms[0], qkv, attention_out, norms[1], gate_up, mlp_out]
    tables = [angles.cos().to(dtype), angles.sin().to(dtype)]
    shape = SideLayerShape(heads, kv_heads, head_dim, lengths, 1e-6)
    return [t.to(device) for t in tensors], [t.to(device) for t in tables], shape


def plain(tensors: list[Tensor], tables: list[Tensor], shape: SideLayerShape, dout: Tensor) -> list[Tensor]:
    """Output and gradients in the dtype of the state, by plain torch on the CPU."""
    state, *weights = (t.cpu() for t in tensors)
    cos, sin = (t.cpu() for t in tables)
    given = (SideLayerWeights(*weights), cos, sin)
    out = side_layer(state, *given, shape.lengths, shape.epsilon)
    gradients = _plain_backward(dout.cpu(), state, *given, None, shape, [True] * 7)
    return [out, *gradients]


def compare(
    tensors: list[Tensor], tables: list[Tensor], shape: SideLayerShape, actual: list[Tensor], dout: Tensor
) -> None:
    dtype = tensors[0].dtype
    rounded = [t.to(dtype).double() for t in tensors]
    truth = plain(rounded, [t.double() for t in tables], shape, dout.double())
    same = plain(tensors, tables, shape, dout)
    for name, ours, expected, reference in zip(("out", *NAMES), actual, truth, same, strict=True):
        assert_close_to_truth(name, ours.cpu(), expected, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients(name: str, dtype: torch.dtype, gpu_device: str) -> None:
    tensors, tables, shape = inputs(name, dtype, gpu_device)
    assert (SHAPES[name][0][0] > FUSED_SIDE_DIM) == (name == "wide")
    state, weights = tensors[0], SideLayerWeights(*tensors[1:])
    dout = torch.randn(state.shape).to(state)
    out = gpu.side_layer(state, weights, *tables, None, shape)
    gradients = gpu.side_layer_backward(dout, state, weights, *tables, None, shape)
    assert out.dtype == gradients[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])
    compare(tensors, tables, shape, [out, *gradients], dout)


def test_weights_in_the_dtype_of_the_state_are_the_same_as_wider_ones_rounded(gpu_device: str) -> None:
    tensors, tables, shape = inputs("ragged", torch.float16, gpu_device)
    state, wide = tensors[0], SideLayerWeights(*tensors[1:])
    narrow = SideLayerWeights(*(weight.half() for weight in wide))
    dout = torch.randn(state.shape).to(state)
    assert_same_bits(
        "out", gpu.side_layer(state, narrow, *tables, None, shape), gpu.side_layer(state, wide, *tables, None, shape)
    )
    for name, one, other in zip(
        NAMES,
        gpu.side_layer_backward(dout, state, narrow, *tables, None, shape),
        gpu.side_layer_backward(dout, state, wide, *tables, None, shape),
        strict=True,
    ):
        assert_same_bits(name, one, other.half())
