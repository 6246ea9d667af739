"""side_layer on the CPU: the layer against its formulas, its gradients, and what it keeps for backward."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_truth, assert_same_bits
from torch import Tensor

from ladder_kernels import SideLayerWeights, attention, native, reference, side_layer
from ladder_kernels.side_layer import NATIVE_ROWS, SideLayerCall, SideLayerShape, plain_side_layer

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 24, 4, 2, 6, 20
LENGTHS = (5, 1, 7)
NAMES = ("state", *SideLayerWeights._fields)


def inputs(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    width: int = WIDTH,
    inner: int = INNER,
    lengths: tuple[int, ...] = LENGTHS,
) -> list[Tensor]:
    """State, the six weights, cos and sin; the first seven want gradients."""
    tokens, mixed = sum(lengths), heads * head_dim
    rows = (heads + 2 * kv_heads) * head_dim
    shapes = [(width,), (rows, width), (width, mixed), (width,), (2 * inner, width), (width, inner)]
    weights = [torch.randn(shape) * shape[-1] ** -0.5 if len(shape) == 2 else torch.rand(shape) + 1 for shape in shapes]
    angles = torch.randn(tokens, head_dim // 2).repeat(1, 2)
    state = torch.randn(tokens, width).to(dtype).requires_grad_()
    leaves = [state, *(w.to(weight_dtype or dtype).requires_grad_() for w in weights)]
    return [*leaves, angles.cos().to(dtype), angles.sin().to(dtype)]


def ours(tensors: list[Tensor], **options: Any) -> Tensor:
    state, *weights, cos, sin = tensors
    return side_layer(state, SideLayerWeights(*weights), cos, sin, LENGTHS, 1e-5, **options)


def plain(tensors: list[Tensor]) -> Tensor:
    """The formulas in plain torch, every activation kept by autograd."""
    state, *weights, cos, sin = tensors
    attention_norm, qkv, attention_out, mlp_norm, gate_up, mlp_out = (w.to(state.dtype) for w in weights)
    heads = F.linear(reference.rms_norm(state, attention_norm, 1e-5), qkv).unflatten(-1, (-1, HEAD_DIM))
    query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    mixed = attention(reference.rotary(query, cos, sin), reference.rotary(key, cos, sin), value, LENGTHS)
    state = state + F.linear(mixed, attention_out)
    gate, up = F.linear(reference.rms_norm(state, mlp_norm, 1e-5), gate_up).chunk(2, dim=-1)
    return state + F.linear(reference.swiglu(gate, up), mlp_out)


def copied(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Leaves with the same values; in another dtype, weights are first rounded to that of the state."""
    narrow = tensors[0].dtype
    return [
        (t.detach().clone() if dtype is None else t.detach().to(narrow).to(dtype)).requires_grad_(t.requires_grad)
        for t in tensors
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_bits_as_plain_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without the native library, which fp64 does not use anyway."""
    if dtype != torch.float64:
        monkeypatch.setattr(native, "available", lambda: False)
    tensors = inputs(dtype, torch.promote_types(dtype, torch.float32))
    expected = copied(tensors)
    out, plain_out = ours(tensors), plain(expected)
    assert_same_bits("out", out.detach(), plain_out.detach())
    dout = torch.randn_like(out)
    out.backward(dout)
    plain_out.backward(dout)
    for name, leaf, other in zip(NAMES, tensors, expected, strict=False):
        assert leaf.grad is not None and other.grad is not None
        assert_same_bits(f"gradient of {name}", leaf.grad, other.grad)


# (rows per document, query heads, key heads, head size, S, F): ragged, aligned and longer than a block of the norms'
# sums, one row, an empty document, grouped heads
TRAINED = [
    (LENGTHS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER),
    ((64, 64, 64), 1, 1, 64, 64, 320),
    ((1,), 1, 1, 2, 7, 3),
    ((9, 0, 4), 2, 1, 4, 33, 17),
    ((70, 1, 59), 6, 2, 32, 96, 41),
]


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", TRAINED, ids=str)
def test_training(
    native_isa: str, sizes: tuple[Any, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    """The native forward and backward pass; dout is not contiguous."""
    lengths, *shape = sizes
    tensors = inputs(dtype, weight_dtype, *shape, lengths=lengths)
    state, *weights, cos, sin = tensors
    dout = torch.randn(state.shape[::-1]).to(dtype).T

    def gradients(tensors: list[Tensor], operation: Any) -> tuple[Tensor, ...]:
        state, *weights, cos, sin = tensors
        out = operation(state, SideLayerWeights(*weights), SideLayerCall(cos, sin, None, of, None))
        return (out.detach(), *torch.autograd.grad(out, tensors[:7], dout.to(out.dtype)))

    def public(state: Tensor, weights: SideLayerWeights, call: SideLayerCall) -> Tensor:
        return side_layer(state, weights, call.cos, call.sin, lengths, 1e-5)

    heads, kv_heads, head_dim = shape[:3]
    of = SideLayerShape(heads, kv_heads, head_dim, lengths, 1e-5)
    got = gradients(tensors, public)
    truth, plain_gradients = (gradients(copied(tensors, wide), plain_side_layer) for wide in (torch.float64, None))
    for name, *values in zip(("out", *NAMES), got, truth, plain_gradients, strict=True):
        assert_close_to_truth(name, *values)
    for name, one, leaf in zip(NAMES, got[1:], tensors, strict=False):
        assert one.dtype == leaf.dtype, name
    with torch.no_grad():
        if sum(lengths) > NATIVE_ROWS:
            assert_same_bits(
                "evaluation", public(state, SideLayerWeights(*weights), SideLayerCall(cos, sin, None, of)), got[0]
            )
    for name, one, other in zip(("out", *NAMES), gradients(tensors, public), got, strict=True):
        assert_same_bits(name, one, other)


def test_training_takes_the_native_backward(monkeypatch: pytest.MonkeyPatch, native_isa: str) -> None:
    monkeypatch.setattr(sys.modules["ladder_kernels.side_layer"], "_plain_backward", None)
    ours(inputs(torch.float32)).sum().backward()


def test_no_rows() -> None:
    state, *weights, cos, sin = inputs(torch.float32)
    empty = state.detach()[:0].requires_grad_()
    side_layer(empty, SideLayerWeights(*weights), cos[:0], sin[:0], [0], 1e-5).sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_without_gradients() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(dtype)
        truth = copied(tensors, torch.float64)
        with torch.no_grad():
            assert_close_to_truth("out", ours(tensors), plain(truth), plain(tensors))


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1, 7), (NATIVE_ROWS, 40), (NATIVE_ROWS + 1, 40)], ids=str)
def test_few_rows(native_isa: str, rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    """Every row is a document of its own beside two earlier ones, as in cached decoding."""
    tensors = [t.detach() for t in inputs(dtype, weight_dtype, width=width)]
    tensors[0], tensors[7], tensors[8] = (tensors[i][:rows].contiguous() for i in (0, 7, 8))
    earlier = torch.randn(2, rows, KV_HEADS, 2, HEAD_DIM).to(dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (torch.cat((e.to(t), t[:, :, None]), 2) for e, t in zip(earlier, (key, value), strict=True))
        out = F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
        return out.flatten(1)

    def run(tensors: list[Tensor], operation: Any) -> Tensor:
        state, *weights, cos, sin = tensors
        shape = SideLayerShape(HEADS, KV_HEADS, HEAD_DIM, (1,) * rows, 1e-5)
        return operation(state, SideLayerWeights(*weights), SideLayerCall(cos, sin, None, shape, attend))

    def public(state: Tensor, weights: SideLayerWeights, call: SideLayerCall) -> Tensor:
        return side_layer(state, weights, call.cos, call.sin, call.shape.lengths, 1e-5, attend=attend)

    truth = run(copied(tensors, torch.float64), plain_side_layer)
    assert_close_to_truth("out", run(tensors, public), truth, run(tensors, plain_side_layer))


def test_few_rows_take_the_native_layer(monkeypatch: pytest.MonkeyPatch, native_isa: str) -> None:
    calls = []
    monkeypatch.setattr(native, "side_layer", lambda state, *_: calls.append(len(state)) or state)
    for tokens in (1, NATIVE_ROWS, NATIVE_ROWS + 1):
        state, *weights, cos, sin = (t.detach() for t in inputs(torch.float32))
        side_layer(state[:tokens], SideLayerWeights(*weights), cos[:tokens], sin[:tokens], [tokens], 1e-5)
    assert calls == [1, NATIVE_ROWS]


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *tensors: ours(list(tensors)), inputs(torch.float64), fast_mode=True)


def test_only_its_inputs_are_kept_for_backward() -> None:
    tensors = inputs(torch.bfloat16, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ours(tensors)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in tensors}
    assert len(saved) == len(tensors)
    out.float().sum().backward()


def test_only_wanted_gradients_are_computed() -> None:
    for unwanted in ((0, 2, 6), (1, 3, 4, 5)):
        tensors = inputs(torch.float32)
        expected = copied(tensors)
        for index in unwanted:
            tensors[index].requires_grad_(False)
        for leaves in (tensors, expected):
            ours(leaves).sum().backward()
        for index, (leaf, other) in enumerate(zip(tensors[:7], expected, strict=False)):
            assert (leaf.grad is None) == (index in unwanted)
            assert leaf.grad is None or torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_can_be_computed_elsewhere(dtype: torch.dtype) -> None:
    tensors = inputs(dtype, torch.float32)
    shapes = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shapes.append((query.shape, key.shape, value.shape))
        return attention(query, key, value, LENGTHS)

    out, plain_out = ours(tensors, attend=attend), plain(tensors)
    assert_same_bits("with gradients", out, plain_out)
    given, expected = (torch.autograd.grad(o.float().sum(), tensors[:7]) for o in (out, plain_out))
    for name, one, other in zip(NAMES, given, expected, strict=True):
        assert_same_bits(f"gradient of {name}", one, other)
    with torch.no_grad():
        assert_same_bits("without", ours(tensors, attend=attend), ours(tensors))
    tokens = sum(LENGTHS)
    heads, kv_heads = (tokens, HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM)
    assert shapes == [(heads, kv_heads, kv_heads)] * 2


def test_documents_do_not_see_each_other() -> None:
    tensors = inputs(torch.float64)
    out = ours(tensors)
    state, *weights, cos, sin = tensors
    begin = 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        alone = side_layer(state[rows], SideLayerWeights(*weights), cos[rows], sin[rows], [length], 1e-5)
        torch.testing.assert_close(out[rows], alone, rtol=1e-12, atol=1e-12)
        begin += length


def test_autocast_changes_nothing() -> None:
    tensors = inputs(torch.float32)
    under = copied(tensors)
    expected = ours(tensors)
    expected.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(under)
        out.sum().backward()
    assert torch.equal(out, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(under[:7], tensors, strict=False))


def test_inputs_are_not_written() -> None:
    tensors = inputs(torch.float32)
    before = copied(tensors)
    ours(tensors).sum().backward()
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_a_changed_weight_is_noticed() -> None:
    tensors = inputs(torch.float32)
    out = ours(tensors)
    with torch.no_grad():
        tensors[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_wrong_arguments() -> None:
    tensors = inputs(torch.float32)
    state, *weights, cos, sin = tensors
    given = SideLayerWeights(*weights)

    def call(**changed: Any) -> Tensor:
        arguments = {"state": state, "weights": given, "cos": cos, "sin": sin, "lengths": LENGTHS} | changed
        return side_layer(**arguments, epsilon=1e-5)

    with pytest.raises(ValueError, match=r"expected lengths >= 0 that sum to the 13 rows of state, got \[5, 7\]"):
        call(lengths=(5, 7))
    with pytest.raises(ValueError, match=r"expected lengths >= 0 that sum to the 13 rows of state, got \[-1, 14\]"):
        call(lengths=(-1, 14))
    with pytest.raises(ValueError, match=r"expected lengths >= 0 that sum to the 0 rows of state, got \[\]"):
        call(state=state[:0], cos=cos[:0], sin=sin[:0], lengths=())
    with pytest.raises(ValueError, match=r"expected cos of shape \[13, d\]"):
        call(cos=cos[1:])
    with pytest.raises(ValueError, match=r"heads of d = 0"):
        call(cos=cos[:, :0], sin=sin[:, :0])
    with pytest.raises(ValueError, match=r"expected mlp_out of shape \[rows, columns\], got \[\]"):
        call(weights=given._replace(mlp_out=given.mlp_out.sum()))
    with pytest.raises(TypeError, match="expected offsets in int32, got int64"):
        call(offsets=torch.tensor([0, *LENGTHS]))
    with pytest.raises(ValueError, match=r"heads of d = 6, got \[47, 24\]"):
        call(weights=given._replace(qkv=given.qkv[:47]))
    with pytest.raises(ValueError, match=r"multiple of the key heads, got 4 and 3"):
        call(weights=given._replace(qkv=torch.randn(60, WIDTH)))
    with pytest.raises(ValueError, match=r"expected qkv of shape \[48, 24\], got \[48, 23\]"):
        call(weights=given._replace(qkv=given.qkv[:, 1:]))
    with pytest.raises(ValueError, match=r"expected sin of shape \[13, 6\], got \[13, 4\]"):
        call(sin=sin[:, 2:])
    with pytest.raises(ValueError, match=r"expected gate_up of shape \[40, 24\], got \[38, 24\]"):
        call(weights=given._replace(gate_up=given.gate_up[:38]))
    with pytest.raises(TypeError, match="expected mlp_out in float32, got bfloat16"):
        call(weights=given._replace(mlp_out=given.mlp_out.bfloat16()))
    with pytest.raises(TypeError, match="expected weights in bfloat16 or float32, got float16"):
        side_layer(state.bfloat16(), SideLayerWeights(*(w.half() for w in weights)), cos, sin, LENGTHS, 1e-5)
    with pytest.raises(ValueError, match="expected contiguous state"):
        call(state=state.T.contiguous().T)
