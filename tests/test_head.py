"""The packed frozen head: int8 and NF4 decoded in panels, their logits, loss and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth, assert_same_bits, assert_sum_close_to_truth
from test_linear_cross_entropy import DTYPES, SHAPES, inputs, plain
from torch import Tensor

from ladder_kernels import (
    HeadWeight,
    Int8Weight,
    Workspace,
    decode_head,
    head_logits,
    launch,
    linear_cross_entropy,
    quantize_int8,
    quantize_nf4,
)

QUANTIZERS = {"int8": quantize_int8, "nf4": quantize_nf4}


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of a few rows, so that even a small head has many and a ragged last one."""
    for name, value in (("CACHED_PANEL_BYTES", 2048), ("MANY_TOKENS_PANEL_BYTES", 2048), ("PANEL_ROW_MULTIPLE", 7)):
        monkeypatch.setattr(launch, name, value)


def check_loss(weight: HeadWeight, hidden: Tensor, targets: Tensor, **options: object) -> None:
    """Against plain torch and fp64 on the decoded head: decoding is exact, so only the products may differ."""
    dense = decode_head(weight, hidden.dtype)
    same, truth = hidden.detach().clone().requires_grad_(), hidden.detach().double().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    plain_losses, true_losses = plain(same, dense, targets), plain(truth, dense.double(), targets)
    for total in (loss, plain_losses.sum(), true_losses.sum()):
        (total * 0.5).backward()
    assert_sum_close_to_truth("loss per row", loss.detach(), true_losses.detach(), plain_losses.detach())
    assert_close_to_truth("gradient of hidden", hidden.grad, truth.grad, same.grad)


@pytest.mark.parametrize("scheme", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(small_panels, shape, dtype, scheme):
    hidden, head, targets = inputs(shape, dtype, ignored=int(shape[0] > 5))
    check_loss(QUANTIZERS[scheme](head), hidden, targets, chunk_bytes=80 * shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation(implementation, small_panels, dtype):
    hidden, head, targets = inputs((37, 13, 101), dtype)
    check_loss(quantize_nf4(head, 64, False), hidden, targets, chunk_bytes=80 * 101)


@pytest.mark.parametrize("scheme", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 32), (37, 13), (1, 1, 1), (0, 8)], ids=str)
def test_logits(small_panels, shape, dtype, scheme):
    x, weight = torch.randn(shape).to(dtype), QUANTIZERS[scheme](torch.randn(101, shape[-1]))
    dense = decode_head(weight, dtype)
    actual = head_logits(x, weight)
    assert actual.dtype == dtype
    assert_close_to_truth("logits", actual, x.double() @ dense.double().T, x @ dense.T)


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 70),
    exponent=st.integers(-45, 37),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_int8_is_off_by_half_a_step(rows, cols, exponent, dtype, seed):
    torch.manual_seed(seed)
    weight = (torch.randn(rows, cols) * 10.0**exponent).to(dtype).nan_to_num(0, 0, 0)
    weight[0] *= seed % 2
    packed = quantize_int8(weight)
    absmax = weight.double().abs().amax(dim=1, keepdim=True)
    error = (packed.codes * packed.scales.double()[:, None] - weight.double()).abs()
    # Rows too small for a scale in fp32 are kept as zeros.
    assert bool((error <= torch.where(absmax > 1e-36, absmax / 254 * (1 + 1e-5), absmax)).all())
    assert int(packed.codes.abs().max()) <= 127
    decoded = decode_head(packed, dtype)
    assert_same_bits("decoded", decoded, (packed.codes * packed.scales[:, None]).to(dtype))


def test_int8_in_chunks_is_int8_in_one_piece(monkeypatch):
    weight = torch.randn(23, 7)
    whole = quantize_int8(weight)
    monkeypatch.setattr("ladder_kernels.int8._CHUNK", 14)
    cut = quantize_int8(weight)
    assert_same_bits("codes", cut.codes, whole.codes)
    assert_same_bits("scales", cut.scales, whole.scales)
    assert whole.nbytes == 23 * 7 + 23 * 4 and whole.shape == (23, 7)
    assert whole.to("meta").device.type == "meta"


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_scratch_is_reused_and_smaller_than_the_head(small_panels, scheme):
    hidden, head, targets = inputs((8, 32, 300), torch.bfloat16)
    weight, workspace = QUANTIZERS[scheme](head), Workspace()
    linear_cross_entropy(hidden, weight, targets, chunk_bytes=4800, workspace=workspace).backward()
    held = workspace.nbytes
    # Logits, wide ones without the native library, sums, a panel of five times seven rows.
    assert held <= 2400 + 4800 + 4 * 4 * 32 + 35 * 32 * 2
    linear_cross_entropy(hidden, weight, targets, chunk_bytes=4800, workspace=workspace).backward()
    assert workspace.nbytes == held < head.nbytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.randn(6, 5)
    weight[4, 2] = value
    with pytest.raises(ValueError, match="expected finite weights, got NaN or infinity in rows 0 and after"):
        quantize_int8(weight)


def test_wrong_arguments():
    hidden, head, targets = inputs((6, 5, 9), torch.float32)
    packed = quantize_int8(head)
    with pytest.raises(TypeError, match="expected hidden in float32, bfloat16 or float16, got float64"):
        linear_cross_entropy(hidden.double(), packed, targets)
    with pytest.raises(ValueError, match=r"expected head_weight of shape \[V, 4\], got"):
        linear_cross_entropy(hidden[:, :4], packed, targets)
    with pytest.raises(ValueError, match=r"x requires a gradient.*linear_cross_entropy"):
        head_logits(hidden, packed)
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 5\], got \[6, 4\]"):
        head_logits(hidden.detach()[:, :4], packed)
    with pytest.raises(TypeError, match="expected x in"):
        head_logits(hidden.detach().double(), packed)
    with pytest.raises(ValueError, match="expected a matrix with weights in it"):
        quantize_int8(head[:0])
    with pytest.raises(TypeError, match="expected weight in"):
        quantize_int8(head.double())
    with pytest.raises(ValueError, match=r"expected scales of shape \[9\], got \[8\]"):
        Int8Weight(packed.codes, packed.scales[:8])
    with pytest.raises(ValueError, match="contiguous codes"):
        Int8Weight(packed.codes.T.contiguous().T, packed.scales)
    logits, loss = torch.zeros(2, 9), torch.ops.ladder.linear_cross_entropy
    for panels, sums, message in (
        (None, None, "expected panels and, for 16 bits, sums as scratch of a packed head"),
        (torch.zeros(1, 2, 4), None, r"expected panels of shape \[count, P, 5\], got \[1, 2, 4\]"),
        (torch.zeros(1, 0, 5), None, "at least one row"),
        (torch.zeros(1, 2, 5, dtype=torch.float16), None, "expected panels in float32, got float16"),
        (torch.zeros(1, 2, 5), torch.zeros(1, 5), r"expected sums of shape \[2, 5\], got \[1, 5\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            loss(hidden, [packed.codes, packed.scales], 0, targets, logits, None, panels, sums, True)
    with pytest.raises(ValueError, match=r"expected 1 tensor \(dense\), 2 \(int8\), 3 or 6 \(NF4\), got 4"):
        loss(hidden, [head] * 4, 64, targets, logits, None, None, None, True)
