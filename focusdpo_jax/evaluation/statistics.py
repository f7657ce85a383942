"""Means with bootstrap intervals, and the table that compares the policy with its base."""

from typing import NamedTuple

import numpy as np

from focusdpo_jax.evaluation import tables
from focusdpo_jax.toybox.measures import LOWER_IS_BETTER


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


def summarize(base, policy=None, *, seed):
    """Estimates every measure of the base and, if there is one, of the policy and of their difference.

    Args:
      base, policy: what `toybox_measures.measure` returned of the same scenes in one order, batches joined
        along the scenes.
      seed: of the bootstrap.

    Returns:
      {"metrics": {name: {"base": {"mean", "low", "high", "n"}, "policy": the same, "difference": the same of
      policy minus base (`bootstrap_difference`)}}}, plain numbers, ready for JSON. Measures that neither side
      defines are left out.
    """
    sides = {"base": base} | ({"policy": policy} if policy is not None else {})
    metrics = {}
    for name in base:
        estimates = {
            side: bootstrap_mean(measures[name], seed=seed) for side, measures in sides.items()
        }
        if policy is not None:
            estimates["difference"] = bootstrap_difference(base[name], policy[name], seed=seed)
        if any(estimate.n for estimate in estimates.values()):
            metrics[name] = {side: estimate._asdict() for side, estimate in estimates.items()}
    return {"metrics": metrics}


def verdict(name, difference):
    """Returns "better" or "worse" by a difference (dict of an estimate), "" if its interval contains 0."""
    if not tables.certain(difference):
        return ""
    return "better" if (difference["mean"] > 0) != (name in LOWER_IS_BETTER) else "worse"


def format_table(results):
    """The results as aligned plain text, in per cent, with the intervals in brackets.

    An arrow behind a measure's name points to where better is. The last columns are the difference, in
    percentage points, and how the policy differs where the interval of the difference leaves out zero.

    Args:
      results: what `summarize` returned.

    Returns:
      Lines joined by newlines, none behind the last.
    """
    metrics = results["metrics"]
    sides = [
        side
        for side in ("base", "policy")
        if any(side in estimates for estimates in metrics.values())
    ]
    compared = len(sides) == 2
    lines = [["measure", *sides, *["policy - base", "policy is"] * compared, "scenes"]]
    for name, estimates in metrics.items():
        arrow = "↓" if name in LOWER_IS_BETTER else "↑"
        line = [f"{name.replace('_', ' ')} {arrow}"]
        line += [_percent(estimates[side]) for side in sides]
        if compared:
            line += [_points(estimates["difference"]), verdict(name, estimates["difference"])]
        # Leakage counts found subjects only, so the two sides may differ.
        counts = dict.fromkeys(str(estimates[side]["n"]) for side in sides)
        lines.append([*line, "/".join(counts)])
    return tables.aligned(lines)


def _percent(estimate):
    if not estimate["n"]:
        return "-"
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:5.1f} % [{low:5.1f}, {high:5.1f}]"


def _points(difference):
    if not difference["n"]:
        return "-"
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+5.1f} [{low:+5.1f}, {high:+5.1f}]"
