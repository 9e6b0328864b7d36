"""Means with 95% intervals. Every interval that sparring prints comes from `estimate`.

Rows of one prompt are not independent, so each prompt is one cluster. An iteration that was chosen because of its value
is judged on prompts that did not choose it: see `halves`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from sparring.run.iteration import seed_of

FLAT = 1e-3
"""A change, in nats per token or as a fraction, that counts as no change whatever its interval."""

ROUNDING = 1e-12


class Bounds(NamedTuple):
    """Of values that cannot be outside, and the pseudo-rows that are added at each."""

    low: float
    high: float
    pseudo_rows: float


FRACTION = Bounds(0.0, 1.0, 2.0)
"""Agresti & Coull (1998)."""
DIFFERENCE = Bounds(-1.0, 1.0, 0.5)
"""Of two fractions, paired by row: after Agresti & Min (2005)."""


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float | None  # of the 95% interval; None with fewer than two clusters, which say nothing about others
    high: float | None
    clusters: int

    def named(self, metric: str) -> dict[str, float]:
        """As metrics.json has it: the metric, and METRIC_low and METRIC_high if there is an interval."""
        if self.low is None or self.high is None:
            return {metric: self.mean}
        return {metric: self.mean, f"{metric}_low": self.low, f"{metric}_high": self.high}

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0 and the change is not flat, otherwise 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high or abs(self.mean) <= FLAT:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(
    values: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"] | None = None,
    clusters: np.ndarray | None = None,
    bounds: Bounds | None = None,
) -> Estimate:
    """sum(values) / sum(weights) with its 95% interval over clusters. Leaves out rows whose value is NaN.

    `clusters` has a name per row, such as its prompt; without it every row is one. Without `weights` it is the mean.
    The variance is the jackknife's, which leaves out one cluster at a time and is not too small when clusters differ in
    size (CR3 of Bell & McCaffrey, 2002). Student's t has as many degrees of freedom as clusters, minus 1.

    Within `bounds`, the standard error of rare events is too small, and 0 where no row differs. So pseudo-rows at both
    bounds are added to the effective number of rows (Dean & Pagano, 2015). The interval then is not symmetric.
    """
    is_known = ~np.isnan(values)
    values = values[is_known]
    weights = np.ones_like(values) if weights is None else weights[is_known]
    if not len(values):
        return Estimate(float("nan"), None, None, 0)
    mean = float(values.sum() / weights.sum())
    _, codes = np.unique(np.arange(len(values)) if clusters is None else clusters[is_known], return_inverse=True)
    count = int(codes.max()) + 1
    if count < 2:
        return Estimate(mean, None, None, count)
    shares = np.bincount(codes, weights) / weights.sum()
    residuals = np.bincount(codes, values - mean * weights) / weights.sum()
    variance = float((count - 1) / count * ((residuals / (1 - shares)) ** 2).sum())
    quantile = float(stdtrit(count - 1, 0.975))
    if bounds is None:
        half = quantile * variance**0.5
        return Estimate(mean, mean - half, mean + half, count)
    spread = float(((values - mean) ** 2).mean())
    effective = min(len(values), spread / variance) if spread > ROUNDING and variance > 0 else count
    low, high, added = bounds
    total = effective + 2 * added
    center = (effective * mean + added * (low + high)) / total
    square = (effective * (spread + mean**2) + added * (low**2 + high**2)) / total
    half = quantile * ((square - center**2) / total) ** 0.5
    return Estimate(mean, max(low, center - half), min(high, center + half), count)


def halves(prompts: Iterable[str]) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """(rows that choose an iteration, rows that judge it): two halves of the prompts, by hash.

    Of an odd number of prompts one more judges. One prompt does both, and has no interval.
    """
    names = list(prompts)
    order = sorted(set(names), key=lambda prompt: seed_of("choose", prompt))
    choosing = set(order[: len(order) // 2])
    is_choosing = np.array([prompt in choosing for prompt in names], dtype=bool)
    return (is_choosing, ~is_choosing) if choosing else (~is_choosing, ~is_choosing)
