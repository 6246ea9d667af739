"""The frozen final norm: the bits of plain torch in both directions, in slices, keeping its input only."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_same_bits

from ladder_kernels import frozen_rms_norm, reference


@pytest.mark.parametrize("slice_bytes", [1, 150, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (7, 13), (1, 1), (0, 8)], ids=str)
def test_bits_of_plain_torch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, slice_bytes: int
) -> None:
    monkeypatch.setattr("ladder_kernels.frozen_norm._SLICE_BYTES", slice_bytes)
    x, weight, dout = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype), torch.randn(shape).to(dtype)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = frozen_rms_norm(ours, weight, 1e-6)
    assert saved == [ours.data_ptr(), weight.data_ptr()]
    expected = reference.rms_norm(plain, weight, 1e-6)
    assert_same_bits("out", out.detach(), expected.detach())
    out.backward(dout)
    expected.backward(dout)
    assert_same_bits("dx", ours.grad, plain.grad)
    with torch.no_grad():
        assert_same_bits("without gradient", frozen_rms_norm(x, weight, 1e-6), expected.detach())
    assert_same_bits("not wanted", frozen_rms_norm(x, weight, 1e-6), expected.detach())


def test_a_weight_that_learns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frozen_rms_norm: weight requires a gradient.*frozen"):
        frozen_rms_norm(torch.randn(2, 3), torch.ones(3, requires_grad=True), 1e-6)
