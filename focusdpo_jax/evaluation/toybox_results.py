"""The results table of a Toybox run: estimates of base and policy, and their difference."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from focusdpo_jax.evaluation import tables
from focusdpo_jax.evaluation.statistics import bootstrap_difference, bootstrap_mean
from focusdpo_jax.toybox.metrics import LOWER_IS_BETTER


def summarize(
    base: Mapping[str, np.ndarray], policy: Mapping[str, np.ndarray] | None = None, *, seed: int
) -> dict[str, Any]:
    """Estimates every metric of the base and, if given, of the policy and of the difference.

    Args:
      base, policy: results of `toybox.metrics.compute` for the same scenes in the same order,
        concatenated along the scenes.
      seed: seed of the bootstrap.

    Returns:
      {"metrics": {name: {"base": {"mean", "low", "high", "n"}, "policy": the same, "difference":
      policy minus base (`bootstrap_difference`)}}}, as JSON values. Metrics that neither side
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


def verdict(name: str, difference: Mapping[str, Any]) -> str:
    """Returns "better", "worse", or "" if the interval of a difference (dict) contains zero."""
    if not tables.certain(difference):
        return ""
    return "better" if (difference["mean"] > 0) != (name in LOWER_IS_BETTER) else "worse"


def format_table(results: Mapping[str, Any]) -> str:
    """Formats the results as aligned plain text, in per cent, with intervals in brackets.

    An arrow after a metric marks the better direction. The last columns are the difference, in
    percentage points, and its verdict.

    Args:
      results: result of `summarize`.

    Returns:
      Lines joined by newlines, without a trailing newline.
    """
    metrics = results["metrics"]
    sides = [
        side
        for side in ("base", "policy")
        if any(side in estimates for estimates in metrics.values())
    ]
    compared = len(sides) == 2
    lines = [["measure", *sides, *["policy - base", "vs. base"] * compared, "scenes"]]
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


def _percent(estimate: Mapping[str, Any]) -> str:
    if not estimate["n"]:
        return "-"
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:5.1f} % [{low:5.1f}, {high:5.1f}]"


def _points(difference: Mapping[str, Any]) -> str:
    if not difference["n"]:
        return "-"
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+5.1f} [{low:+5.1f}, {high:+5.1f}]"
