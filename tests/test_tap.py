"""tap: projection, merge and their gradients."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close_to_truth
from torch import Tensor

from ladder_kernels import reference, tap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128, 32), (37, 71, 13), (1, 1, 1)]
MERGES = ["first", "sum", "gate"]


INT8_SHAPES = [(64, 128, 32), (37, 71, 13), (3, 5, 2), (1, 1, 1)]


def inputs(
    shape: tuple[int, int, int], merge: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> list[Tensor | None]:
    tokens, width, side = shape
    h = torch.randn(tokens, width, dtype=dtype)
    weight = (torch.randn(side, width) / width**0.5).to(weight_dtype).requires_grad_()
    state = None if merge == "first" else torch.randn(tokens, side, dtype=dtype).requires_grad_()
    gate = torch.tensor(0.3, dtype=weight_dtype, requires_grad=True) if merge == "gate" else None
    return [h, weight, state, gate]


def plain(h: Tensor, weight: Tensor, state: Tensor | None, gate: Tensor | None) -> Tensor:
    z = h @ weight.to(h.dtype).T
    if state is None:
        return z
    return state + z if gate is None else gate * state + (1 - gate) * z


def copied(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Leaves with the same values; in another dtype, `weight` is first rounded to that of h, as the product does."""
    if dtype is None:
        return [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    h, weight, state, gate = tensors
    rounded = [h, weight.detach().to(h.dtype).requires_grad_(), state, gate]
    return [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in rounded]


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("weight_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, weight_dtype, merge):
    ours = inputs(shape, merge, dtype, dtype if weight_dtype == "same" else torch.float32)
    same, truth = copied(ours), copied(ours, torch.float64)
    results = [tap(*ours), plain(*same), plain(*truth)]
    dout = torch.randn(results[0].shape, dtype=dtype)
    assert results[0].dtype == dtype
    assert_close_to_truth("out", results[0].detach(), results[2].detach(), results[1].detach())
    for result in results:
        result.backward(dout.to(result.dtype))
    for name, leaf, plain_leaf, true_leaf in zip(
        ("weight", "state", "gate"), ours[1:], same[1:], truth[1:], strict=True
    ):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            # The gate's gradient is one sum over T * S products: its error is judged at that scale.
            scale = (shape[0] * shape[2]) ** 0.5 if name == "gate" else 1.0
            gradients = (leaf.grad / scale, true_leaf.grad / scale, plain_leaf.grad / scale)
            assert_close_to_truth(f"gradient of {name}", *gradients)


@pytest.mark.parametrize("merge", MERGES)
def test_gradcheck(merge):
    tensors = inputs((5, 7, 3), merge, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(tap, tuple(tensors))


def test_fp32_weight_gradient_beside_bf16_is_not_rounded_to_bf16():
    h, weight, _, _ = inputs((64, 32, 8), "first", torch.bfloat16, torch.float32)
    dout = torch.randn(64, 8, dtype=torch.bfloat16)
    tap(h, weight).backward(dout)
    torch.testing.assert_close(weight.grad, dout.float().T @ h.float(), rtol=1e-5, atol=1e-5)


def test_weight_gradient_in_column_chunks(monkeypatch):
    monkeypatch.setattr("ladder_kernels.reference._GRADIENT_CHUNK_BYTES", 64 * 4 * 5)
    test_fp32_weight_gradient_beside_bf16_is_not_rounded_to_bf16()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=str)
def test_an_int8_copy_decodes_within_half_a_step(shape, dtype):
    h = (torch.randn(shape[:2]) * 10).to(dtype)
    h[:, ::7] *= 100  # the few large columns of hidden states
    codes, scales = reference.encode_hidden(h)
    decoded = reference.decode_hidden(codes, scales, dtype)
    groups = -(-shape[1] // 64)
    assert codes.dtype == torch.int8 and codes.shape == h.shape
    assert scales.dtype == torch.float32 and scales.shape == (shape[0], groups)
    assert decoded.dtype == dtype
    for group in range(groups):
        columns = slice(64 * group, 64 * group + 64)
        absmax = h[:, columns].double().abs().amax(dim=1, keepdim=True)
        bound = absmax * (1 / 254 + 1e-6 + torch.finfo(dtype).eps / 2)
        assert bool(((decoded[:, columns].double() - h[:, columns].double()).abs() <= bound).all())
        assert bool((decoded[:, columns].abs().double() >= absmax * (1 - 1e-2)).any(dim=1).all()), "the largest stays"


def test_an_int8_copy_of_what_is_tiny_or_not_finite():
    h = torch.zeros(4, 70)
    h[1, 3], h[2, 3], h[3, 3], h[1:, 65] = 1e-38, torch.inf, torch.nan, 2.0
    decoded = reference.decode_hidden(*reference.encode_hidden(h), torch.float32)
    assert bool((decoded[0] == 0).all()) and float((decoded[1, :64] - h[1, :64]).abs().max()) <= 1e-38
    assert bool(decoded[2:, :64].isnan().all()), "whoever reads it must notice"
    torch.testing.assert_close(decoded[1:, 64:], h[1:, 64:])


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=str)
def test_gradients_from_an_int8_copy(shape, dtype, merge):
    """They are those of the decoded copy, and so as far from the exact ones as the copy is from h."""
    exact = inputs(shape, merge, dtype, torch.float32)
    from_copy, of_decoded = copied(exact), copied(exact)
    of_decoded[0] = reference.decode_hidden(*reference.encode_hidden(exact[0]), dtype)
    results = [tap(*exact), tap(*from_copy, keep="int8"), tap(*of_decoded)]
    assert torch.equal(results[0], results[1]), "the result is that of h itself"
    dout = torch.randn(shape[0], shape[2]).to(dtype)
    for result in results:
        result.backward(dout)
    for leaf, other in zip(from_copy[1:], of_decoded[1:], strict=True):
        if leaf is not None:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-5)
    # |error of dweight| <= sum over tokens of |dout| * error of h, each at most absmax / 254 and half an ulp.
    absmax = exact[0].double().abs().amax(dim=1, keepdim=True).expand(shape[:2])
    step = absmax * (1 / 254 + torch.finfo(dtype).eps / 2)
    bound = dout.double().abs().T @ step + 1e-5
    assert bool(((from_copy[1].grad.double() - exact[1].grad.double()).abs() <= bound).all())


def saved_by(merge: str, train_gate: bool, **options: str) -> list[tuple[int, ...]]:
    tensors = inputs((6, 10, 3), merge, torch.float32, torch.float32)
    if tensors[3] is not None:
        tensors[3].requires_grad_(train_gate)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tap(*tensors, **options)
    return sorted(saved)


def test_what_is_kept_for_backward():
    h, weight, state, gate = (6, 10), (3, 10), (6, 3), ()
    assert saved_by("first", False) == sorted([h, weight])
    assert saved_by("sum", False) == sorted([h, weight])
    assert saved_by("gate", False) == sorted([h, weight, gate])
    assert saved_by("gate", True) == sorted([h, weight, gate, state])
    assert saved_by("first", False, keep="int8") == sorted([h, (6, 1), weight])
    assert saved_by("gate", True, keep="int8") == sorted([h, (6, 1), weight, gate, state])


@pytest.mark.parametrize("merge", MERGES)
def test_autocast_changes_nothing(merge):
    ours = inputs((6, 10, 3), merge, torch.float32, torch.float32)
    under = copied(ours)
    expected = tap(*ours)
    expected.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(tap(*under), expected)
        out = tap(*under)
        out.sum().backward()
    assert torch.equal(out, expected)
    for one, other in zip(under[1:], ours[1:], strict=True):
        assert one is None or torch.equal(one.grad, other.grad)


def test_inputs_are_not_written():
    tensors = inputs((6, 10, 3), "gate", torch.float32, torch.float32)
    before = copied(tensors)
    with torch.no_grad():
        tap(*tensors)
    tap(*tensors).sum().backward()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_eager_and_dispatched_agree():
    tensors = inputs((6, 10, 3), "gate", torch.float32, torch.float32)
    with torch.no_grad():
        assert torch.equal(tap(*tensors), torch.ops.ladder.tap(*tensors, False)[0])


def test_wrong_arguments():
    h, weight, state, gate = inputs((6, 10, 3), "gate", torch.float32, torch.float32)
    with pytest.raises(ValueError, match="tap: expected keep 'input' or 'int8', got 'int4'"):
        tap(h, weight, keep="int4")
    with pytest.raises(ValueError, match=r"tap: h requires a gradient.*detach"):
        tap(h.clone().requires_grad_(), weight)
    with pytest.raises(ValueError, match=r"expected weight of shape \[S, 10\], got \[3, 9\]"):
        tap(h, weight[:, :9])
    with pytest.raises(ValueError, match=r"expected state of shape \[6, 3\], got \[5, 3\]"):
        tap(h, weight, state[:5])
    with pytest.raises(TypeError, match="expected state in float32, got bfloat16"):
        tap(h, weight, state.bfloat16())
    with pytest.raises(ValueError, match="expected a state beside the gate, got None"):
        tap(h, weight, None, gate)
    with pytest.raises(ValueError, match=r"expected gate of shape \[\], got \[1\]"):
        tap(h, weight, state, gate[None])
    with pytest.raises(TypeError, match="expected h in float32, bfloat16, float16 or float64, got int64"):
        tap(h.long(), weight)
