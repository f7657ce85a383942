"""From the scores of images to estimates: tables of values by group, and their means."""

import numpy as np

from focusdpo_jax.evaluation import statistics


def unscored(scenes, scores):
    """Names of scenes that one of `scores`, {name: {scene: ...}}, lacks."""
    return [
        scene.name
        for scene in scenes
        if not all(scene.name in values for values in scores.values())
    ]


def merge_scores(scores):
    """{scene: {measure: value}} of several scorers' {scene: {measure: value}}."""
    whole = {}
    for values in scores:
        for scene, measures in values.items():
            whole.setdefault(scene, {}).update(measures)
    return whole


def values_by_group(scenes, scores):
    """Values by measure, a row a group of scenes.

    Args:
      scenes: list of BenchmarkScene.
      scores: {scene: {measure: a value or a list of values, None where not defined}}.

    Returns:
      {measure: float64 [groups, values]}, NaN where not defined; groups in the order of `scenes`.
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


def summarize(tables, *, seed):
    """Estimates of every measure, of each side and of how they differ.

    Args:
      tables: {side: what `values_by_group` returned, of the same scenes}.
      seed: of the bootstrap.

    Returns:
      {measure: {side: {"mean", "low", "high", "n"}}}; with both base and policy also "difference",
      policy minus base on the same scenes. Measures that no side defines are left out.
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
