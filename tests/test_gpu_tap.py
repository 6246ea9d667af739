"""The Triton tap and its gradients: on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import sys

import pytest
import torch
from numerics import TRITON_DTYPES, assert_close_to_truth, assert_same_bits
from test_tap import MERGES, copied, inputs, plain
from torch import Tensor

from ladder_kernels import reference, tap

pytest.importorskip("triton")
gpu = pytest.importorskip("ladder_kernels.gpu.tap")
tiles = pytest.importorskip("ladder_kernels.gpu.tap_tiles")

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:divide by zero")]  # numpy, in the interpreter

# Arithmetic in bf16 is wrong in the interpreter.
# (T, D, S): aligned; ragged in every tile; tiny; few tokens in one ragged tile; more side outputs than one tile
SHAPES = [(64, 128, 64), (71, 139, 13), (1, 1, 1), (17, 200, 33), (40, 64, 130)]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["ladder_kernels.tap"], "uses_triton_products", lambda *_: True)


def on(device: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]


def check(ours: list[Tensor | None], keep: str) -> None:
    """The tap against fp64; from an int8 copy, the gradients against those of the decoded copy."""
    h = ours[0]
    tokens, side = h.shape[0], ours[1].shape[0]
    same, truth = copied(ours), copied(ours, torch.float64)
    out = tap(*ours, keep=keep)
    assert out.dtype == h.dtype
    assert_close_to_truth("out", out.detach(), plain(*truth).detach(), plain(*same).detach())
    if keep == "int8":
        decoded = reference.decode_hidden(*reference.encode_hidden(h), h.dtype)
        same[0], truth[0] = decoded, decoded.double()
    dout = torch.randn_like(out)
    for result in (out, plain(*same), plain(*truth)):
        result.backward(dout.to(result.dtype))
    for name, *leaves in zip(("weight", "state", "gate"), ours[1:], same[1:], truth[1:], strict=True):
        if leaves[0] is not None:
            assert leaves[0].grad.dtype == leaves[0].dtype
            # The gate's gradient is one sum over T * S products: its error is judged at that scale.
            scale = (tokens * side) ** 0.5 if name == "gate" else 1.0
            actual, expected, exact = (leaf.grad / scale for leaf in leaves)
            assert_close_to_truth(f"gradient of {name}", actual, exact, expected)


@pytest.mark.parametrize("keep", ["input", "int8"])
@pytest.mark.parametrize("weight_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(gpu_device, shape, dtype, weight_dtype, keep):
    ours = inputs(shape, "gate", dtype, dtype if weight_dtype == "same" else torch.float32)
    check(on(gpu_device, ours), keep)


@pytest.mark.parametrize("keep", ["input", "int8"])
@pytest.mark.parametrize("merge", MERGES)
def test_merges(gpu_device, merge, keep):
    check(on(gpu_device, inputs((37, 71, 13), merge, torch.float32, torch.float32)), keep)


@pytest.mark.parametrize("keep", ["input", "int8"])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("merge", ["sum", "gate"])
def test_tokens_in_parts_and_in_tall_tiles(gpu_device, monkeypatch, merge, dtype, keep):
    """Parts that end inside a tile, and the tile of many tokens with one that is not full."""
    monkeypatch.setattr(tiles, "MANY_TOKENS", 64)
    monkeypatch.setattr(tiles, "_PART_TOKENS", 64)
    assert tiles.gradient_parts(203, 13, 71, tiles.gradient_tile(dtype.itemsize, keep == "int8")).count > 1
    check(on(gpu_device, inputs((203, 71, 13), merge, dtype, torch.float32)), keep)


@pytest.mark.parametrize("trained", ["weight", "state", "gate"])
def test_only_what_is_needed(gpu_device, trained):
    tensors = on(gpu_device, inputs((20, 70, 9), "gate", torch.float32, torch.float32))
    names = ("h", "weight", "state", "gate")
    everything = copied(tensors)
    tap(*everything).square().sum().backward()
    for name, tensor in zip(names, tensors, strict=True):
        tensor.requires_grad_(name == trained)
    tap(*tensors).square().sum().backward()
    for name, tensor, other in zip(names, tensors, everything, strict=True):
        assert (tensor.grad is not None) == (name == trained)
        if name == trained:
            assert_same_bits(name, tensor.grad, other.grad)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_the_int8_copy_is_the_reference_to_the_bit(gpu_device, dtype):
    h = (torch.randn(70, 139, device=gpu_device) * 10).to(dtype)
    h[:, ::7] *= 100
    h[3] = 0.0
    out, codes, scales = gpu.tap(h, torch.randn(5, 139, device=gpu_device), None, None, True)
    expected_codes, expected_scales = reference.encode_hidden(h)
    assert_same_bits("codes", codes, expected_codes)
    assert_same_bits("scales", scales, expected_scales)
    assert bool(out.isfinite().all())


def test_strides(gpu_device):
    """Rows of a wider matrix, columns in the other order, and the gradient that sum() expands from one number."""
    wide = torch.randn(20, 300, device=gpu_device)
    weight, gate = torch.randn(70, 9, device=gpu_device).T, torch.tensor(0.3, device=gpu_device)
    for h, state in ((wide[:, 10:80], wide[:, 100:109]), (wide[:, :280:4], wide[:, 100:280:20])):
        strided, plain_leaves = [[t.detach().requires_grad_() for t in (weight, state, gate)] for _ in range(2)]
        out, expected = tap(h, *strided), plain(h, *plain_leaves)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
        out.sum().backward()
        expected.sum().backward()
        for leaf, other in zip(strided, plain_leaves, strict=True):
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_nothing_to_do(gpu_device, shape):
    tensors = on(gpu_device, inputs((4, 5, 3), "gate", torch.float32, torch.float32))
    tokens, width, side = shape
    h, weight = tensors[0][:tokens, :width], tensors[1].detach()[:side, :width].requires_grad_()
    state = tensors[2].detach()[:tokens, :side].expand(tokens, side).clone().requires_grad_()
    out = tap(h, weight, state, tensors[3], keep="int8")
    out.sum().backward()
    torch.testing.assert_close(out, 0.3 * state)
    assert weight.grad.shape == weight.shape and state.grad.shape == state.shape
    torch.testing.assert_close(tensors[3].grad, state.sum().detach())


def test_second_derivatives_take_plain_torch(gpu_device):
    tensors = on(gpu_device, inputs((5, 7, 3), "gate", torch.float32, torch.float32))
    (dweight,) = torch.autograd.grad(tap(*tensors).square().sum(), tensors[1], create_graph=True)
    dweight.square().sum().backward()
    assert bool(tensors[1].grad.isfinite().all())


def test_same_bits_again(gpu_device, monkeypatch):
    monkeypatch.setattr(tiles, "_PART_TOKENS", 64)
    tensors = on(gpu_device, inputs((200, 71, 13), "gate", torch.float16, torch.float32))
    dout = torch.randn(200, 13, dtype=torch.float16, device=gpu_device)
    first = torch.autograd.grad(tap(*tensors, keep="int8"), tensors[1:], dout)
    for _ in range(2):
        again = torch.autograd.grad(tap(*tensors, keep="int8"), tensors[1:], dout)
        for one, other in zip(first, again, strict=True):
            assert_same_bits("gradient", one, other)


def test_tiles():
    assert tiles.forward_tile(1, 2, False) == (16, 16, 128, 4, 3)
    assert tiles.forward_tile(1, 2, True) == (64, 64, 64, 4, 3)
    assert tiles.forward_tile(2048, 2, False) == (64, 64, 64, 4, 3)
    assert tiles.forward_tile(8192, 2, True) == (128, 64, 64, 8, 3)
    assert tiles.forward_tile(8192, 4, True) == (32, 32, 64, 4, 2)
    tile = tiles.gradient_tile(2, False)
    assert tiles.gradient_parts(2048, 224, 3584, tile) == (1, 2048)
    assert tiles.gradient_parts(2048, 56, 896, tile) == (4, 512)
    assert tiles.gradient_parts(1100, 16, 64, tile) == (2, 576)
    assert tiles.gradient_parts(1, 1, 1, tile) == (1, 64)
