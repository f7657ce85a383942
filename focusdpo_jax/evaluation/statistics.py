"""Means with bootstrap intervals, and the table that compares the policy with its base."""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its interval. All but `n` are None where no value was defined.

    Attributes:
      mean, low, high: the mean of the defined values, and the ends of the interval around it.
      n: number of scenes that have a defined value: what was resampled.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


def bootstrap_mean(values, *, seed, resamples=2000, confidence=0.95):
    """The mean of values that come in scenes, with a percentile bootstrap interval.

    Whole scenes are drawn with replacement, since what happens to the subjects of one scene goes
    together (Efron, 1979). Each resample's mean is its sum of values over its number of values.
    Where all values are equal the interval has no width, however few they are.

    Args:
      values: [scenes] or [scenes, subjects], NaN where not defined.
      seed: the same seed gives the same interval.
      resamples: number of draws.
      confidence: share of the resampled means that lie in the interval.

    Returns:
      An Estimate.
    """
    sums = _sums(values)
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return Estimate(None, None, None, 0)
    total, count = (_resamples(len(sums), seed, resamples) @ sums).T
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    return _estimate(mean, total / count, len(sums), confidence)


def bootstrap_difference(first, second, *, seed, resamples=2000, confidence=0.95):
    """How much higher the mean of `second` is than that of `first`, on the same scenes.

    Every resample draws the same scenes for both, so that what makes a scene hard for both does not
    widen the interval. Only scenes that both define are drawn.

    Args:
      first, second: as the values of `bootstrap_mean`, one row a scene, in one order.
      seed, resamples, confidence: as there.

    Returns:
      An Estimate of mean(second) - mean(first).
    """
    sums = np.concatenate([_sums(first), _sums(second)], axis=1)
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    if not len(sums):
        return Estimate(None, None, None, 0)

    def difference(drawn):
        return drawn[..., 2] / drawn[..., 3] - drawn[..., 0] / drawn[..., 1]

    drawn = _resamples(len(sums), seed, resamples) @ sums
    return _estimate(difference(sums.sum(0)), difference(drawn), len(sums), confidence)


def _sums(values):
    """The sum and the number of the defined values of each scene: [scenes, 2]."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    defined = ~np.isnan(values)
    return np.stack([np.where(defined, values, 0).sum(1), defined.sum(1)], axis=1)


def _resamples(scenes, seed, resamples):
    """How often each scene is drawn, [resamples, scenes]; as floats the product is a fast one."""
    return (
        np.random.default_rng(seed)
        .multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples)
        .astype(np.float64)
    )


def _estimate(mean, resampled, scenes, confidence):
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(mean), float(low), float(high), scenes)
