"""The tolerance rule: an error is judged against that of plain torch in the same dtype, and both against fp64."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FACTOR = 2.0
# A few units in the last place of a value of size 1.
ATOL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# What Triton kernels are tested in: its interpreter multiplies bf16 wrongly, without a word.
TRITON_HALF_DTYPES = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TRITON_DTYPES = [torch.float32, *TRITON_HALF_DTYPES]


def assert_close_to_truth(name: str, actual: Tensor, truth: Tensor, same_dtype_reference: Tensor) -> None:
    """Largest error of `actual` <= 2 x the largest error of plain torch in the same dtype + atol * largest value.

    Args:
        name: the tensor, for the message.
        truth: computed in fp64 from the same inputs.
        same_dtype_reference: what unfused torch computes in the dtype of `actual`.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert truth.dtype == torch.float64, f"{name}: truth must be fp64, got {truth.dtype}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    if actual.numel() == 0:
        return
    error = _largest(actual.double() - truth)
    reference_error = _largest(same_dtype_reference.double() - truth)
    bound = FACTOR * reference_error + ATOL[actual.dtype] * min(1.0, _largest(truth))
    ratio = error / reference_error if reference_error else float(error > 0)
    logger.info("%s: error %.3g, %.2f x plain torch's %.3g", name, error, ratio, reference_error)
    assert error <= bound, f"{name}: error {error:.3g} > {FACTOR} x {reference_error:.3g} + atol = {bound:.3g}"


def assert_sum_close_to_truth(name: str, total: Tensor, true_terms: Tensor, plain_terms: Tensor) -> None:
    """The mean of a sum's terms errs by no more than the rule allows for the worst term of plain torch.

    The error of plain torch's own sum is no measure: a single number's rounding errors cancel by luck, and which ones
    do depends on the machine's matrix product.
    """
    count = max(1, true_terms.numel())
    mean = true_terms.sum() / count
    assert_close_to_truth(name, total / count, mean, mean + (plain_terms.double() - true_terms))


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and bits; a NaN equals any NaN, and -0 differs from +0."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.is_floating_point():
        different = actual != expected
    else:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        different = actual.contiguous().view(integer) != expected.contiguous().view(integer)
        different &= ~(actual.isnan() & expected.isnan())
    if bool(different.any()):
        index = tuple(different.nonzero()[0].tolist())
        count, total = int(different.sum()), different.numel()
        raise AssertionError(
            f"{name}: {count} of {total} differ, first at {index}: {actual[index].item()!r}, "
            f"expected {expected[index].item()!r}"
        )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
