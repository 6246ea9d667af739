"""Kernels of the side layer: in Triton's interpreter without a GPU, on the hardware with one."""

from __future__ import annotations

import sys

import pytest
import torch
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor

from ladder_kernels import SideLayerWeights, side_layer
from ladder_kernels.attention import _flash, attention
from ladder_kernels.gpu import side_config
from ladder_kernels.gpu import side_layer as gpu
from ladder_kernels.gpu.side_config import FUSED_SIDE_DIM, SideSizes
from ladder_kernels.gpu.side_specs import specs
from ladder_kernels.side_layer import SideLayerCall, SideLayerShape, _plain_backward

pytestmark = pytest.mark.gpu

# The interpreter has no right bf16, and a GPU multiplies fp32 through plain torch.
DTYPES = [torch.float16, torch.bfloat16 if torch.cuda.is_available() else torch.float32]
# S, Hq, Hkv, d, F and the documents: aligned, ragged, tiny, and wider than one program's rows.
SHAPES = {
    "aligned": ((64, 3, 1, 32, 96), (64,)),
    "ragged": ((40, 3, 3, 16, 52), (17, 1, 49)),
    "tiny": ((8, 1, 1, 8, 4), (1,)),
    "wide": ((416, 2, 1, 64, 72), (9, 9)),
}
NAMES = ("state", *SideLayerWeights._fields)


def inputs(name: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], SideLayerCall]:
    """State and fp32 weights, and what goes with them."""
    (width, heads, kv_heads, head_dim, inner), lengths = SHAPES[name]
    tokens, mixed = sum(lengths), heads * head_dim
    matrices = [((heads + 2 * kv_heads) * head_dim, width), (width, mixed), (2 * inner, width), (width, inner)]
    qkv, attention_out, gate_up, mlp_out = (torch.randn(shape) * shape[1] ** -0.5 for shape in matrices)
    norms = [1 + 0.1 * torch.randn(width) for _ in range(2)]
    state = torch.randn(tokens, width).to(dtype)
    angles = torch.randn(tokens, head_dim // 2).repeat(1, 2)
    tensors = [state, norms[0], qkv, attention_out, norms[1], gate_up, mlp_out]
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    shape = SideLayerShape(heads, kv_heads, head_dim, lengths, 1e-6)
    return [t.to(device) for t in tensors], SideLayerCall(cos, sin, None, shape)


def tables_to(call: SideLayerCall, target: str | torch.dtype) -> SideLayerCall:
    return call._replace(cos=call.cos.to(target), sin=call.sin.to(target))


def plain(tensors: list[Tensor], call: SideLayerCall, dout: Tensor) -> list[Tensor]:
    """Output and gradients in the dtype of the state, by plain torch on the CPU."""
    state, *weights = (t.cpu() for t in tensors)
    given, call = SideLayerWeights(*weights), tables_to(call, "cpu")
    out = side_layer(state, given, call.cos, call.sin, call.shape.lengths, call.shape.epsilon)
    gradients = _plain_backward(dout.cpu(), state, given, call, [True] * 7)
    return [out, *gradients]


def compare(tensors: list[Tensor], call: SideLayerCall, actual: list[Tensor], dout: Tensor) -> None:
    dtype = tensors[0].dtype
    rounded = [t.to(dtype).double() for t in tensors]
    truth = plain(rounded, tables_to(call, torch.float64), dout.double())
    same = plain(tensors, call, dout)
    for name, ours, expected, reference in zip(("out", *NAMES), actual, truth, same, strict=True):
        assert_close_to_truth(name, ours.cpu(), expected, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients(name: str, dtype: torch.dtype, gpu_device: torch.device) -> None:
    tensors, call = inputs(name, dtype, gpu_device)
    assert (SHAPES[name][0][0] > FUSED_SIDE_DIM) == (name == "wide")
    state, weights = tensors[0], SideLayerWeights(*tensors[1:])
    dout = torch.randn(state.shape).to(state)
    out = gpu.side_layer(state, weights, call)
    gradients = gpu.side_layer_backward(dout, state, weights, call)
    assert out.dtype == gradients[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])
    compare(tensors, call, [out, *gradients], dout)


def test_weights_in_the_dtype_of_the_state_are_the_same_as_wider_ones_rounded(gpu_device: torch.device) -> None:
    tensors, call = inputs("tiny", torch.float16, gpu_device)
    state, wide = tensors[0], SideLayerWeights(*tensors[1:])
    narrow = SideLayerWeights(*(weight.half() for weight in wide))
    dout = torch.randn(state.shape).to(state)
    assert_same_bits("out", gpu.side_layer(state, narrow, call), gpu.side_layer(state, wide, call))
    for name, one, other in zip(
        NAMES,
        gpu.side_layer_backward(dout, state, narrow, call),
        gpu.side_layer_backward(dout, state, wide, call),
        strict=True,
    ):
        assert_same_bits(name, one, other.half())


def test_attention_can_be_computed_elsewhere(gpu_device: torch.device) -> None:
    tensors, call = inputs("tiny", torch.float16, gpu_device)
    state, weights = tensors[0], SideLayerWeights(*tensors[1:])
    other = call._replace(attend=lambda query, key, value: attention(query, key, 2 * value, call.shape.lengths))
    doubled = weights._replace(qkv=torch.cat((weights.qkv[:-8], 2 * weights.qkv[-8:])))
    assert_same_bits("out", gpu.side_layer(state, weights, other), gpu.side_layer(state, doubled, call))


def test_public_op_launches_them(gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ladder_kernels.side_layer"], "_runs_triton", lambda *tensors: True)
    tensors, call = inputs("tiny", torch.float16, gpu_device)
    dout = torch.randn_like(tensors[0])
    expected = gpu.side_layer_backward(dout, tensors[0], SideLayerWeights(*tensors[1:]), call)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    side_layer(
        leaves[0], SideLayerWeights(*leaves[1:]), call.cos, call.sin, call.shape.lengths, call.shape.epsilon
    ).backward(dout)
    for name, leaf, gradient in zip(NAMES, leaves, expected, strict=True):
        assert leaf.grad is not None
        assert_same_bits(name, leaf.grad, gradient)


def test_same_bits_every_time(gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In deterministic mode: flash attention's own backward adds atomically otherwise."""
    torch.use_deterministic_algorithms(True)
    try:
        tensors, call = inputs("ragged", torch.float16, gpu_device)
        state, weights = tensors[0], SideLayerWeights(*tensors[1:])
        first = gpu.side_layer_backward(state, state, weights, call)
        for _ in range(30 if gpu_device == "cuda" else 1):
            for name, one, other in zip(
                NAMES, gpu.side_layer_backward(state, state, weights, call), first, strict=True
            ):
                assert_same_bits(name, one, other)
    finally:
        torch.use_deterministic_algorithms(False)


def test_variable_length_attention_takes_grouped_heads_and_windows() -> None:
    query, key = torch.empty(9, 4, 32, dtype=torch.bfloat16, device="meta"), torch.empty(9, 2, 32, device="meta")
    key = key.bfloat16()
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    for window in (None, 3):
        assert _flash(query, key, key, offsets, 5, window).shape == query.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lengths", [(64,), (33, 1, 30), (32, 32)], ids=str)
def test_flash_attention_of_documents(lengths: tuple[int, ...], window: int | None) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    given = [torch.randn(64, heads, 32, dtype=torch.bfloat16, device="cuda").requires_grad_() for heads in (4, 2, 2)]
    plain_given = [tensor.detach().clone().requires_grad_() for tensor in given]
    truth_given = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    outs = [
        attention(*given, lengths, offsets=offsets, window=window),
        attention(*plain_given, lengths, window=window),
        attention(*truth_given, lengths, window=window),
    ]
    dout = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dout.to(out))
    assert_close_to_truth("out", outs[0].cpu(), outs[2], outs[1].cpu())
    for name, ours, same, truth in zip("qkv", given, plain_given, truth_given, strict=True):
        assert_close_to_truth(f"gradient of {name}", ours.grad.cpu(), truth.grad, same.grad.cpu())


def test_configurations() -> None:
    narrow, seven_b, wide = (SideSizes(s, s // 32, 1, 32, 5 * s) for s in (64, 224, 1024))
    assert [sizes.is_fused for sizes in (narrow, seven_b, wide)] == [True, True, False]
    assert (seven_b.mixed, seven_b.qkv) == (224, 288)
    tiles = [side_config.mlp_config(SideSizes(s, s // 32, 1, 32, 96)).constants for s in (64, 224, 256, 288, 384)]
    assert [tile["BLOCK_M"] for tile in tiles] == [32, 32, 32, 16, 16]
    assert [tile["BLOCK_S"] for tile in tiles] == [64, 256, 256, 512, 512]
    # Steps along a sum divide it where they can: 224 = 7 x 32.
    assert side_config.qkv_config(seven_b, casts=True, for_backward=False).constants["BLOCK_K"] == 32
    assert side_config.qkv_config(wide, casts=True, for_backward=False).constants["BLOCK_K"] == 64


def test_specs_are_unique_and_name_every_argument() -> None:
    every = list(specs())
    assert len({spec.name for spec in every}) == len(every)
    for spec in every:
        assert set(spec.types) | set(spec.constants) == set(spec.kernel.arg_names)
        assert not set(spec.types) & set(spec.constants)
