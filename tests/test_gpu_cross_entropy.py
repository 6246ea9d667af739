"""The Triton softmax of linear_cross_entropy: on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import sys

import pytest
import torch
from numerics import TRITON_DTYPES, assert_close_to_truth, assert_same_bits, assert_sum_close_to_truth
from test_linear_cross_entropy import inputs, plain
from torch import Tensor

from ladder_kernels import Workspace, linear_cross_entropy, reference
from ladder_kernels.launch import logit_chunk_bytes

pytest.importorskip("triton")
gpu = pytest.importorskip("ladder_kernels.gpu.cross_entropy")

pytestmark = pytest.mark.gpu

# Arithmetic in bf16 is wrong in the interpreter.
# (R, V): aligned, ragged, tiny, one word, several passes of the loop with a ragged end
SHAPES = [(4, 512), (5, 37), (1, 1), (3, 2), (2, 9001)]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["ladder_kernels.linear_cross_entropy"], "uses_triton", lambda *_: True)


def losses_of(logits: Tensor, targets: Tensor, need_grad: bool = True) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    gpu.cross_entropy(logits, targets, losses, need_grad)
    return losses


@pytest.mark.parametrize("spread", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(gpu_device, shape, dtype, spread):
    logits = (torch.randn(shape, device=gpu_device) * spread).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1], device=gpu_device)
    targets[1:2] = -100
    truth, same, ours = logits.double(), logits.clone(), logits.clone()
    true_losses = reference.cross_entropy(truth, targets, None, True)
    wide = None if dtype == torch.float32 else torch.empty(shape, device=gpu_device)
    same_losses = reference.cross_entropy(same, targets, wide, True)
    assert_close_to_truth("losses", losses_of(ours, targets), true_losses, same_losses)
    assert_close_to_truth("gradient", ours, truth, same)


def test_without_a_gradient_the_logits_stay(gpu_device):
    logits = torch.randn(3, 45, device=gpu_device)
    targets = torch.tensor([44, -100, 0], device=gpu_device)
    kept = logits.clone()
    without = losses_of(logits, targets, need_grad=False)
    assert_same_bits("logits", logits, kept)
    assert_same_bits("losses", without, losses_of(kept, targets))


def test_writes_its_rows_only(gpu_device):
    buffer = torch.full((5, 33), 7.0, device=gpu_device)
    buffer[2] = torch.nan
    losses = losses_of(buffer[1:4], torch.tensor([3, -100, 32], device=gpu_device))
    assert bool((buffer[0] == 7.0).all()) and bool((buffer[4] == 7.0).all())
    assert bool((buffer[2] == 0.0).all()) and losses[1].item() == 0.0


@pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow) encountered"
)  # numpy, under the interpreter
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_what_is_not_finite(gpu_device, dtype):
    """As the reference: NaN, inf and a row of nothing but -inf spoil their row; single -inf are words ruled out."""
    logits = torch.randn(6, 1100, device=gpu_device).to(dtype)
    logits[0, 700], logits[1, 3], logits[2, :], logits[3, 5:900] = torch.nan, torch.inf, -torch.inf, -torch.inf
    logits[4, 17] = -torch.inf
    targets = torch.tensor([1, 3, 3, 2, 17, 0], device=gpu_device)
    wide = None if dtype == torch.float32 else torch.empty(logits.shape, device=gpu_device)
    same, ours = logits.clone(), logits.clone()
    expected, losses = reference.cross_entropy(same, targets, wide, True), losses_of(ours, targets)
    assert bool(losses[:3].isnan().all()) and bool(ours[:3].isnan().all())
    assert bool(same[:3].isnan().all()) and losses[4].item() == torch.inf
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours[3:], same[3:], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("wrong", [9, -1, -101, 1 << 40])
def test_a_target_outside_of_the_vocabulary_makes_its_loss_nan(gpu_device, wrong):
    losses = losses_of(torch.randn(3, 9, device=gpu_device), torch.tensor([0, wrong, 8], device=gpu_device))
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_loss_and_gradient_of_a_frozen_head(gpu_device, dtype):
    hidden, head_weight, targets = (
        tensor.detach().to(gpu_device) for tensor in inputs((11, 24, 101), dtype, ignored=2)
    )
    same, truth = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    workspace = Workspace()
    loss = linear_cross_entropy(
        hidden.requires_grad_(), head_weight, targets, chunk_bytes=4 * 101 * 4, workspace=workspace
    )
    plain_losses, true_losses = plain(same, head_weight, targets), plain(truth, head_weight.double(), targets)
    for total in (loss, plain_losses.sum(), true_losses.sum()):
        total.backward()
    assert_sum_close_to_truth("loss", loss.detach(), true_losses.detach(), plain_losses.detach())
    assert_close_to_truth("gradient", hidden.grad, truth.grad, same.grad)
    assert workspace.nbytes == 4 * 101 * dtype.itemsize, "no second, wider buffer"


def test_loops():
    assert gpu.row_loop(152064, 2) == (512, 8, 16, 4)
    assert gpu.row_loop(152064, 4) == (512, 4, 16, 4)
    assert gpu.row_loop(2, 2) == (1, 8, 1, 4)
    assert logit_chunk_bytes("cuda") // (152064 * 4) == 551
    assert logit_chunk_bytes("cpu") == 64 << 20
