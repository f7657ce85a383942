"""Means with bootstrap confidence intervals."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A mean and its interval. All fields but `n` are None if no value is defined.

    Attributes:
      mean, low, high: the mean of the defined values, and the ends of its interval.
      n: number of scenes with a defined value, the units of resampling.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


def bootstrap_mean(
    values: ArrayLike, *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Estimate:
    """Computes the mean of values grouped by scene, with a percentile bootstrap interval.

    Whole scenes are drawn with replacement, since the values of one scene are correlated (Efron
    1979). Each resample's mean is its sum of values over its number of values. If all values are
    equal the interval has zero width, however few they are.

    Args:
      values: [scenes] or [scenes, subjects], NaN where not defined.
      seed: seed of the resampling.
      resamples: number of resamples.
      confidence: fraction of the resampled means inside the interval.
    """
    sums = _sums(values)
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return Estimate(None, None, None, 0)
    total, count = (_resamples(len(sums), seed, resamples) @ sums).T
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    return _estimate(mean, total / count, len(sums), confidence)


def bootstrap_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Estimate:
    """Computes mean(second) - mean(first) on the same scenes, with a percentile bootstrap interval.

    Every resample draws the same scenes for both, so that variation between scenes that affects
    both does not widen the interval. Scenes that only one of them defines are left out.

    Args:
      first, second: like `values` of `bootstrap_mean`, one row per scene, in the same order.
      seed, resamples, confidence: see `bootstrap_mean`.
    """
    sums = np.concatenate([_sums(first), _sums(second)], axis=1)
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    if not len(sums):
        return Estimate(None, None, None, 0)

    def difference(totals):
        return totals[..., 2] / totals[..., 3] - totals[..., 0] / totals[..., 1]

    resampled = _resamples(len(sums), seed, resamples) @ sums
    return _estimate(difference(sums.sum(0)), difference(resampled), len(sums), confidence)


def _sums(values: ArrayLike) -> Float64[np.ndarray, "scenes 2"]:
    """Returns the sum and the number of the defined values of each scene: [scenes, 2]."""
    array = np.asarray(values, np.float64)
    rows = array.reshape(len(array), -1)
    defined = ~np.isnan(rows)
    return np.stack([np.where(defined, rows, 0).sum(1), defined.sum(1)], axis=1)


def _resamples(scenes: int, seed: int, resamples: int) -> Float64[np.ndarray, "resamples scenes"]:
    """Returns the multiplicity of each scene, [resamples, scenes], as floats for a fast product."""
    return (
        np.random.default_rng(seed)
        .multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples)
        .astype(np.float64)
    )


def _estimate(mean: float, resampled: np.ndarray, scenes: int, confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(mean), float(low), float(high), scenes)
