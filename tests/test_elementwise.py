"""rms_norm, rotary and swiglu: the native pass, plain torch, and where each of them runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor
from torch.autograd import forward_ad
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ladder_kernels import native, reference, rms_norm, rotary, swiglu, swiglu_

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


def assert_correct(name: str, out: Tensor, *given: Tensor) -> None:
    _, plain = OPS[name]
    assert_close_to_truth(name, out, plain(*(tensor.double() for tensor in given)), plain(*given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_close_to_truth(implementation, name, shape, dtype):
    op, _ = OPS[name]
    given = arguments(name, shape, dtype)
    out = op(*given)
    assert out.dtype == dtype and out.shape == given[0].shape and out.is_contiguous()
    assert_correct(name, out, *given)


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
    assert_correct("swiglu", swiglu(gate, up), gate, up)
    assert_correct("rms_norm", normed(gate, up[0]), gate, up[0])
    heads = both.unflatten(-1, (6, 8))[:, 1:4]
    tables = torch.randn(5, 8), torch.randn(5, 8)
    assert_correct("rotary", rotary(heads, *tables), heads, *tables)


def test_other_strides(implementation):
    x, weight = torch.randn(8, 5).T, torch.randn(16)[::2]
    assert_correct("rms_norm", normed(x, weight), x, weight)
    assert_correct("swiglu", swiglu(x, x.flip(0)), x, x.flip(0))
    heads, tables = torch.randn(4, 5, 6).transpose(0, 1), (torch.randn(6, 5).T, torch.randn(6, 5).T)
    assert_correct("rotary", rotary(heads, *tables), heads, *tables)
    assert normed(torch.randn(2, 3, 8), weight).shape == (2, 3, 8)


def test_swiglu_into_its_gate(implementation):
    both = torch.randn(7, 66)
    for gate, up in ((torch.randn(7, 33), torch.randn(7, 33)), both.clone().chunk(2, dim=-1)):
        before = gate.clone()
        assert swiglu_(gate, up) is gate
        assert_correct("swiglu", gate, before, up)
    buffer = torch.randn(8, 33)
    before = buffer.clone()
    assert_correct("swiglu", swiglu_(buffer[1:], buffer[:-1]), before[1:], before[:-1])
    with torch.inference_mode():
        gate, up = torch.randn(7, 33), torch.randn(7, 33)
        before = gate.clone()
        assert_correct("swiglu", swiglu_(gate, up), before, up)


def test_swiglu_into_its_gate_is_seen_by_autograd(implementation):
    leaf, up = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    saved = leaf.exp()
    with torch.no_grad():
        swiglu_(saved, up)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with pytest.raises(ValueError, match="swiglu_: gate requires a gradient"):
        swiglu_(leaf * 2, up)
    with pytest.raises(ValueError, match="swiglu_: up requires a gradient"):
        swiglu_(torch.randn(3, 8), leaf)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every shape that is checked
@pytest.mark.parametrize("name", OPS)
def test_transforms_and_traces_see_through(implementation, name):
    op, plain = OPS[name]
    given = arguments(name, (5, 2, 8), torch.float32)
    tangents = tuple(torch.randn_like(tensor) for tensor in given)
    with torch.no_grad():
        out, tangent = torch.func.jvp(op, given, tangents)
        assert_same_bits("tangent", tangent, torch.func.jvp(plain, given, tangents)[1])
        with forward_ad.dual_level():
            dual = op(forward_ad.make_dual(given[0], tangents[0]), *given[1:])
            assert forward_ad.unpack_dual(dual).tangent is not None
        traced = torch.jit.trace(op, given)
        assert_correct(name, traced(*tangents), *tangents)
        assert_correct(name, op(torch._neg_view(given[0]), *given[1:]), -given[0], *given[1:])
    assert_correct(name, out, *given)
    stacked = tuple(torch.stack((tensor, tensor)) for tensor in given)
    assert_correct(name, torch.func.vmap(op)(*stacked)[1], *given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_rotary_rounds_as_torch_does(implementation, dtype):
    given = arguments("rotary", (37, 3, 22), dtype)
    assert_same_bits("rotary", rotary(*given), reference.rotary(*given))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 90.0, -90.0, 1e30, -1e30])
def test_silu_over_the_whole_range(implementation, value):
    gate, up = torch.full((2, 40), value), torch.ones(2, 40)
    assert_correct("swiglu", swiglu(gate, up), gate, up)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_silu_of_what_is_not_finite(implementation, value):
    gate, up = torch.full((2, 40), value), torch.ones(2, 40)
    assert_same_bits("swiglu", swiglu(gate, up), reference.swiglu(gate, up))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(130, 4, 32), *SHAPES[1:3]], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_native_gradients(native_isa, name, shape, dtype):
    """Against autograd, also of tables whose halves differ and rows that are columns of a wider matrix."""
    given = arguments(name, shape, dtype)
    dout = torch.randn_like(given[0])

    def gradients(wide):
        leaves = [tensor.to(wide).requires_grad_() for tensor in given]
        out = torch.autograd.grad(OPS[name][1](*leaves), leaves[: 1 if name == "rotary" else 2], dout.to(wide))
        return (out[0] + dout, out[1]) if name == "rms_norm" else out  # where it is the residual, too

    if name == "rms_norm":
        dx, dweight = native.rms_norm_backward(dout, *given, 1e-5, dout)
        got = dx, dweight.to(dtype)
    elif name == "swiglu":
        activation, both = native.swiglu_backward(torch.cat(given, dim=1), dout)
        assert_same_bits("activation", activation, swiglu(*given))
        got = both.chunk(2, dim=1)
    else:
        buffer = torch.full((shape[0], shape[1] + 2, shape[2]), 7.0, dtype=dtype)
        got = (native.rotary_backward(dout, *given[1:], buffer[:, 1:-1]),)
        assert bool((buffer[:, 0] == 7.0).all()) and bool((buffer[:, -1] == 7.0).all())
    for number, values in enumerate(zip(got, gradients(torch.float64), gradients(dtype), strict=True)):
        assert_close_to_truth(f"gradient {number} of {name}", *values)


def test_norm_gradients_do_not_depend_on_threads(native_isa):
    x, dout, weight = torch.randn(1031, 64), torch.randn(1031, 64), torch.randn(64)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(native.rms_norm_backward(dout, x, weight, 1e-5, x))
    torch.set_num_threads(threads)
    for dx, dweight in results[1:]:
        assert_same_bits("dx", dx, results[0][0])
        assert_same_bits("dweight", dweight, results[0][1])


@pytest.mark.parametrize("value", [0.0, 1e-30, 90.0, -90.0, 1e30, -1e30])
def test_gradient_of_silu_over_the_whole_range(native_isa, value):
    gate = torch.full((2, 40), value, requires_grad=True)
    reference.swiglu(gate, torch.ones(2, 40)).sum().backward()
    _, both = native.swiglu_backward(torch.cat((gate.detach(), torch.ones(2, 40)), dim=1), torch.ones(2, 40))
    torch.testing.assert_close(both[:, :40], gate.grad)


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
    with pytest.raises(TypeError, match="rms_norm: expected weight in bfloat16, got float32"):
        rms_norm(x.bfloat16(), torch.ones(4), 1e-5)
    with pytest.raises(TypeError, match=r"rms_norm: expected x in float32, .*got int64"):
        rms_norm(x.long(), torch.ones(4).long(), 1e-5)
    with pytest.raises(ValueError, match=r"rms_norm: expected x .* 0-dim"):
        rms_norm(torch.tensor(1.0), torch.ones(1), 1e-5)
    with pytest.raises(ValueError, match="swiglu: expected up on cpu, got meta"):
        swiglu(torch.ones(3, 2), torch.ones(3, 2, device="meta"))
