"""Aggregates the scores of images: tables of values by group, and their estimates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from focusdpo_jax.evaluation import statistics
from focusdpo_jax.evaluation.scenes import BenchmarkScene


def unscored(
    scenes: Sequence[BenchmarkScene], scores: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Returns the names of scenes that are missing in one of `scores`, {scorer: {scene: ...}}."""
    return [
        scene.name
        for scene in scenes
        if not all(scene.name in values for values in scores.values())
    ]


def merge_scores(scores: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Merges {scene: {metric: value}} of several scorers."""
    whole = {}
    for values in scores:
        for scene, measures in values.items():
            whole.setdefault(scene, {}).update(measures)
    return whole


def values_by_group(
    scenes: Sequence[BenchmarkScene], scores: Mapping[str, Mapping[str, Any]]
) -> dict[str, Float64[np.ndarray, "groups values"]]:
    """Arranges values by metric, with one row per group of scenes.

    Args:
      scenes: scenes of the benchmark.
      scores: {scene: {metric: a value or a list of values, None where not defined}}.

    Returns:
      {metric: float64 [groups, values]}, NaN where not defined; groups in the order of `scenes`.
    """
    names = dict.fromkeys(name for scene in scenes for name in scores[scene.name])
    tables = {}
    for name in names:
        rows = {}
        for scene in scenes:
            value = scores[scene.name].get(name)
            row = rows.setdefault(scene.group, [])
            row.extend(value if isinstance(value, list) else [value])
        table = np.full((len(rows), max(map(len, rows.values()))), np.nan)
        for line, row in zip(table, rows.values()):
            line[: len(row)] = [np.nan if value is None else value for value in row]
        tables[name] = table
    return tables


def summarize(
    tables: Mapping[str, Mapping[str, Float64[np.ndarray, "groups _"]]], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Estimates every metric of each side, and the difference of the sides.

    Args:
      tables: {side: the result of `values_by_group` for the same scenes}.
      seed: seed of the bootstrap.

    Returns:
      {metric: {side: {"mean", "low", "high", "n"}}}; with both base and policy also "difference",
      policy minus base on the same scenes. Metrics that no side defines are left out.
    """
    metrics = {}
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        sides = {side: table[name] for side, table in tables.items() if name in table}
        estimates = {
            side: statistics.bootstrap_mean(values, seed=seed)._asdict()
            for side, values in sides.items()
        }
        if {"base", "policy"} <= sides.keys():
            estimates["difference"] = statistics.bootstrap_difference(
                sides["base"], sides["policy"], seed=seed
            )._asdict()
        if any(estimate["n"] for estimate in estimates.values()):
            metrics[name] = estimates
    return metrics
