"""rms_norm, rotary and swiglu: the native pass, plain torch, and where each of them runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ladder_kernels import native, reference, rms_norm, rotary, swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, heads, head size): aligned, ragged, tiny, empty
SHAPES = [(64, 4, 32), (37, 3, 22), (1, 1, 2), (0, 2, 8)]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5)


def plain_normed(x: Tensor, weight: Tensor) -> Tensor:
    return reference.rms_norm(x, weight, 1e-5)


def arguments(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens, heads, size = shape
    if name == "rms_norm":
        return (torch.randn(tokens, heads * size) * 3).to(dtype), torch.randn(heads * size).to(dtype)
    if name == "rotary":
        angles = torch.randn(tokens, size)
        return torch.randn(tokens, heads, size).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)
    return (torch.randn(tokens, heads * size) * 4).to(dtype), torch.randn(tokens, heads * size).to(dtype)


OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms_norm": (normed, plain_normed),
    "rotary": (rotary, reference.rotary),
    "swiglu": (swiglu, reference.swiglu),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_close_to_truth(implementation, name, shape, dtype):
    op, plain = OPS[name]
    given = arguments(name, shape, dtype)
    truth = plain(*(tensor.double() for tensor in given))
    out = op(*given)
    assert out.dtype == dtype and out.shape == given[0].shape and out.is_contiguous()
    assert_close_to_truth(name, out, truth, plain(*given))


@pytest.mark.parametrize("name", OPS)
def test_gradients_flow_through_plain_torch(implementation, name):
    op, _ = OPS[name]
    given = [tensor.double().requires_grad_() for tensor in arguments(name, (3, 2, 4), torch.float32)]
    assert torch.autograd.gradcheck(op, given)
    wide = [tensor.detach().float().requires_grad_() for tensor in given]
    assert op(*wide).requires_grad
    with torch.no_grad():
        assert not op(*wide).requires_grad


def test_rows_of_a_wider_matrix(implementation):
    """Queries and keys are columns of one product, as gate and up are."""
    both = torch.randn(5, 48)
    gate, up = both.chunk(2, dim=-1)
    assert torch.allclose(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    assert torch.allclose(normed(gate, up[0]), normed(gate.contiguous(), up[0].contiguous()))
    heads = both.unflatten(-1, (6, 8))[:, 1:4]
    tables = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.allclose(rotary(heads, *tables), rotary(heads.contiguous(), *tables))


def test_other_strides(implementation):
    x, weight = torch.randn(8, 5).T, torch.randn(16)[::2]
    assert torch.allclose(normed(x, weight), normed(x.contiguous(), weight.contiguous()))
    assert torch.allclose(swiglu(x, x.flip(0)), swiglu(x.contiguous(), x.flip(0).contiguous()))
    heads, tables = torch.randn(4, 5, 6).transpose(0, 1), (torch.randn(6, 5).T, torch.randn(6, 5).T)
    assert torch.allclose(rotary(heads, *tables), rotary(heads.contiguous(), *(t.contiguous() for t in tables)))
    assert normed(torch.randn(2, 3, 8), weight).shape == (2, 3, 8)


def test_swiglu_may_overwrite_its_gate(implementation):
    gate, up = torch.randn(7, 33), torch.randn(7, 33)
    expected = swiglu(gate, up)
    assert swiglu(gate, up, out=gate) is gate
    assert_same_bits("out", gate, expected)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 90.0, -90.0, 1e30, -1e30, torch.inf, torch.nan])
def test_silu_over_the_whole_range(implementation, value):
    gate, up = torch.full((2, 40), value), torch.ones(2, 40)
    truth = reference.swiglu(gate.double(), up.double())
    assert torch.allclose(swiglu(gate, up).double(), truth, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_norm_of_zeros_and_of_what_is_not_finite(implementation):
    x = torch.zeros(3, 20)
    x[1, 3] = torch.inf
    out = normed(x, torch.ones(20))
    assert bool((out[0] == 0).all()) and bool(out[1, 3].isnan()) and bool((out[2] == 0).all())


def test_16_bits_are_rounded_before_the_weight_as_transformers_does():
    theirs = LlamaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
    theirs.weight.data.normal_()
    x = torch.randn(17, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(plain_normed(x, theirs.weight), theirs(x))
        assert float((normed(x, theirs.weight) != theirs(x)).float().mean()) < 0.01


def test_native_writes_its_own_memory_only(native_isa):
    buffer = torch.full((4, 21), 7.0)
    native.swiglu(torch.randn(2, 21), torch.randn(2, 21), buffer[1:3])
    assert bool((buffer[0] == 7.0).all()) and bool((buffer[3] == 7.0).all())


def test_wrong_arguments():
    x = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \[4\], got \[3\]"):
        rms_norm(x, torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match=r"rotary: expected x of shape \[T, H, d\], got \[2, 4\]"):
        rotary(x[0], torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="rotary: expected heads of even size, got 3"):
        rotary(x[..., :3], torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"rotary: expected sin of shape \[3, 4\], got \[2, 4\]"):
        rotary(x, torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"swiglu: expected up of shape \[3, 2\], got \[3, 1\]"):
        swiglu(torch.ones(3, 2), torch.ones(3, 1))
