"""How the loss falls with compute: L(C) = B / C^lambda + E, fitted by least squares, with bootstrap intervals.

For a given lambda the rest is linear, so lambda alone is searched, and B >= 0 and E >= 0 are solved for. C is taken in
units of its geometric mean, in which B is a loss and the fit is well conditioned; `Fit.coefficient` is in FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SLOPES = np.geomspace(0.01, 3.0, 200)
_REFINED, _REFINEMENTS = 41, 4
_RESAMPLED = 2000  # with 200 the ends of intervals moved by 0.08 from seed to seed
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Fit:
    """L(C) = coefficient / C^slope + floor.

    Attributes:
        coefficient: B, in nats x FLOPs^lambda.
        slope: lambda.
        floor: E, nats.
    """

    coefficient: float
    slope: float
    floor: float

    def loss(self, flops: float) -> float:
        """L(C)."""
        return self.coefficient / flops**self.slope + self.floor


@dataclass(frozen=True)
class Interval:
    """What 95 % of the resampled fits lie in."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def fit(flops: Sequence[float], losses: Sequence[float]) -> Fit:
    """The least squares fit.

    Args:
        flops: C > 0 of each training, at least three different ones.
        losses: L of each, finite.

    Raises:
        ValueError: fewer budgets than the curve has parameters, or values out of range.
    """
    compute, loss = np.asarray(flops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(np.unique(compute)) < 3 or compute.shape != loss.shape:
        raise ValueError(f"expected a loss for each of at least 3 budgets, got {len(np.unique(compute))} budgets")
    if not (np.isfinite(loss).all() and np.isfinite(compute).all() and (compute > 0).all()):
        raise ValueError("expected finite losses at positive FLOPs")
    unit = math.exp(np.log(compute).mean())
    slopes = _SLOPES
    for _ in range(_REFINEMENTS):
        errors, scales, floors = _linear_parts((compute / unit) ** -slopes[:, None], loss)
        best = int(np.argmin(errors))
        slope, scale, floor = float(slopes[best]), float(scales[best]), float(floors[best])
        slopes = np.linspace(slopes[max(best - 1, 0)], slopes[min(best + 1, len(slopes) - 1)], _REFINED)
    return Fit(scale * unit**slope, slope, floor)


def intervals(flops: Sequence[float], losses: Sequence[float], seed: int = 0) -> dict[str, Interval]:
    """Of B, lambda and E, by adding the fit's residuals, drawn anew with replacement, to its curve.

    Residuals are widened by sqrt(n / (n - 3)) for the three parameters that were fitted to them.

    Args:
        flops, losses: as of `fit`, n of them, more than three.

    Raises:
        ValueError: as `fit`, or three points only, through which the curve goes exactly.
    """
    if len(losses) < 4:
        raise ValueError(f"expected more than 3 trainings for an interval, got {len(losses)}")
    found, generator = fit(flops, losses), np.random.default_rng(seed)
    curve = np.array([found.loss(compute) for compute in flops])
    residuals = (np.asarray(losses) - curve) * math.sqrt(len(curve) / (len(curve) - 3))
    fits = [fit(flops, curve + generator.choice(residuals, len(curve))) for _ in range(_RESAMPLED)]
    return {
        name: Interval(*np.quantile([getattr(one, name) for one in fits], _QUANTILES).tolist())
        for name in ("coefficient", "slope", "floor")
    }


def _linear_parts(powers: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared errors, B and E of the best non-negative loss [n] = B p + E for each row p of powers [slopes, n]."""
    centered = powers - powers.mean(1, keepdims=True)
    scale = centered @ loss / (centered**2).sum(1)
    floor = loss.mean() - scale * powers.mean(1)
    floor = np.where(scale < 0, loss.mean(), floor)
    scale = np.where(floor < 0, powers @ loss / (powers**2).sum(1), np.maximum(scale, 0))
    floor = np.maximum(floor, 0)
    error = loss - scale[:, None] * powers - floor[:, None]
    return (error**2).sum(1), scale, floor
