"""linear_cross_entropy: loss and gradient of a frozen head, in chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth, assert_same_bits, assert_sum_close_to_truth
from torch import Tensor

from ladder_kernels import Workspace, linear_cross_entropy, native, reference
from ladder_kernels.launch import logit_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (R, D, V): aligned, ragged, tiny, more than one block of the native softmax
SHAPES = [(64, 32, 256), (37, 13, 101), (1, 1, 1), (5, 8, 2), (3, 8, 1037)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, ignored: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    targets[rows - ignored :] = -100
    return hidden, torch.randn(vocabulary, width).to(dtype), targets


def plain(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """The losses of the rows [R]."""
    logits = hidden @ head_weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)


def check(hidden: Tensor, head_weight: Tensor, targets: Tensor, **options: object) -> None:
    same, truth = hidden.detach().clone().requires_grad_(), hidden.detach().double().requires_grad_()
    loss = linear_cross_entropy(hidden, head_weight, targets, **options)
    plain_losses, true_losses = plain(same, head_weight, targets), plain(truth, head_weight.double(), targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    for total in (loss, plain_losses.sum(), true_losses.sum()):
        (total * 0.5).backward()
    assert hidden.grad.dtype == hidden.dtype
    assert_sum_close_to_truth("loss per row", loss.detach(), true_losses.detach(), plain_losses.detach())
    assert_close_to_truth("gradient of hidden", hidden.grad, truth.grad, same.grad)


@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(implementation, shape, dtype, ignored):
    check(*inputs(shape, dtype, ignored))


@given(rows=st.integers(1, 20), vocabulary=st.integers(1, 50), chunk=st.integers(1, 4000), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_do_not_matter(implementation, rows, vocabulary, chunk, seed):
    torch.manual_seed(seed)
    check(*inputs((rows, 7, vocabulary), torch.float32, ignored=min(rows, seed % 3)), chunk_bytes=chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(implementation, dtype):
    hidden, head_weight, targets = inputs((16, 8, 33), torch.float32)
    check((hidden.detach() * 40).to(dtype).requires_grad_(), head_weight.to(dtype), targets)


def test_ignored_rows_have_no_gradient_and_no_loss(implementation):
    hidden, head_weight, targets = inputs((6, 5, 9), torch.float32, ignored=2)
    loss = linear_cross_entropy(hidden, head_weight, targets)
    loss.backward()
    assert torch.equal(hidden.grad[4:], torch.zeros(2, 5))
    assert torch.equal(loss, linear_cross_entropy(hidden[:4], head_weight, targets[:4]))


def test_non_finite_padding_rows_are_harmless(implementation):
    hidden, head_weight, targets = inputs((6, 5, 9), torch.float32, ignored=2)
    expected = linear_cross_entropy(hidden, head_weight, targets)
    spoiled = hidden.detach().clone()
    spoiled[4:] = torch.inf
    spoiled.requires_grad_()
    loss = linear_cross_entropy(spoiled, head_weight, targets)
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(spoiled.grad[4:], torch.zeros(2, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_rows_spoil_the_loss_and_their_own_gradient_only(implementation, value):
    hidden, head_weight, targets = inputs((6, 5, 90), torch.float32)
    spoiled = hidden.detach().clone()
    spoiled[2] = value
    spoiled.requires_grad_()
    for tensor in (hidden, spoiled):
        loss = linear_cross_entropy(tensor, head_weight, targets)
        loss.backward()
    assert not bool(loss.isfinite())
    assert bool(spoiled.grad[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    assert_same_bits("gradient", spoiled.grad[others], hidden.grad[others])


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 86.0, 88.0, 200.0])
def test_softmax_over_the_range_of_exp(native_isa, spread):
    """Differences up to and beyond the smallest fp32 exponential, against fp64."""
    logits = -spread * torch.rand(7, 1500)
    targets = torch.randint(0, 1500, (7,))
    truth, plain_logits, ours = logits.double(), logits.clone(), logits.clone()
    true_losses = reference.cross_entropy(truth, targets, None, True)
    plain_losses = reference.cross_entropy(plain_logits, targets, None, True)
    assert_close_to_truth("losses", native.cross_entropy(ours, targets, True), true_losses, plain_losses)
    assert_close_to_truth("gradient", ours, truth, plain_logits)


def test_native_softmax_writes_its_rows_only(native_isa):
    buffer = torch.full((5, 33), 7.0)
    native.cross_entropy(buffer[1:4], torch.tensor([3, -100, 32]), True)
    assert bool((buffer[0] == 7.0).all()) and bool((buffer[4] == 7.0).all())
    assert bool((buffer[2] == 0.0).all())
    kept = buffer.clone()
    native.cross_entropy(buffer[1:4], torch.tensor([3, -100, 32]), False)
    assert torch.equal(buffer, kept)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_supervised(implementation, rows):
    hidden, head_weight, targets = inputs((rows, 5, 9), torch.bfloat16, ignored=rows)
    loss = linear_cross_entropy(hidden, head_weight, targets)
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_gradcheck():
    hidden, head_weight, targets = inputs((6, 5, 9), torch.float64, ignored=1)
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, head_weight, targets, chunk_bytes=200), hidden)


def test_no_gradient_computes_only_the_loss(implementation):
    hidden, head_weight, targets = inputs((6, 5, 9), torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head_weight, targets)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden, head_weight, targets).detach())
    assert not linear_cross_entropy(hidden.detach(), head_weight, targets).requires_grad


def test_only_the_gradient_is_kept_and_the_buffer_is_reused():
    hidden, head_weight, targets = inputs((40, 5, 100), torch.float32)
    workspace, saved = Workspace(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        linear_cross_entropy(hidden, head_weight, targets, chunk_bytes=4000, workspace=workspace)
    assert saved == [(40, 5)]
    held = workspace.nbytes
    assert held <= 4000
    linear_cross_entropy(hidden, head_weight, targets, chunk_bytes=4000, workspace=workspace).backward()
    assert workspace.nbytes == held


@pytest.mark.parametrize(("rows", "chunk_bytes", "expected"), [(100, 4000, 10), (11, 4000, 6), (3, 1, 1), (0, 4000, 1)])
def test_logit_rows(rows, chunk_bytes, expected):
    assert logit_rows(rows, 100, 4, chunk_bytes) == expected


def test_wrong_arguments():
    hidden, head_weight, targets = inputs((6, 5, 9), torch.float32)
    for wrong in (9, -1, -101):
        spoiled = targets.clone()
        spoiled[3] = wrong
        with pytest.raises(ValueError, match=rf"expected targets in \[0, 9\) or -100, got {wrong} in row 3"):
            linear_cross_entropy(hidden, head_weight, spoiled)
        with pytest.raises(ValueError, match=f"got {wrong} in row 3"):
            torch.ops.ladder.linear_cross_entropy(
                hidden, [head_weight], 0, spoiled, torch.zeros(2, 9), None, None, None, True
            )
    with pytest.raises(ValueError, match=r"expected head_weight of shape \[V, 5\], got \[9, 4\]"):
        linear_cross_entropy(hidden, head_weight[:, :4], targets)
    with pytest.raises(TypeError, match="expected head_weight in float32, got bfloat16"):
        linear_cross_entropy(hidden, head_weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"expected targets of shape \[6\], got \[5\]"):
        linear_cross_entropy(hidden, head_weight, targets[:5])
    with pytest.raises(TypeError, match="expected targets in int64, got int32"):
        linear_cross_entropy(hidden, head_weight, targets.int())
    with pytest.raises(ValueError, match=r"head_weight requires a gradient.*frozen"):
        linear_cross_entropy(hidden, head_weight.clone().requires_grad_(), targets)
    for logits, message in (
        (torch.zeros(2, 8), r"expected logits of shape \[chunk, 9\], got \[2, 8\]"),
        (torch.zeros(0, 9), "at least one row"),
        (torch.zeros(2, 18)[:, ::2], "contiguous logits"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.ladder.linear_cross_entropy(hidden, [head_weight], 0, targets, logits, None, None, None, True)
    with pytest.raises(ValueError, match="expected positive chunk_bytes, got 0"):
        linear_cross_entropy(hidden, head_weight, targets, chunk_bytes=0)
    with pytest.raises(ValueError, match=r"expected head_weight \[V, D\] with V > 0, got \[0, 5\]"):
        linear_cross_entropy(hidden, head_weight[:0], targets)
