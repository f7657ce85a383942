"""Comparison of several evaluations: one table, with differences from the first."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float64

from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import statistics, summaries
from focusdpo_jax.evaluation.output_folder import OutputFolder
from focusdpo_jax.evaluation.scenes import BenchmarkScene
from focusdpo_jax.evaluation.tables import format_estimates


class Compared(NamedTuple):
    """The scores of several evaluations on the scenes that all of them have.

    Attributes:
      sides: "policy", or "base" if there is no policy, of each.
      scenes: the scenes.
      tables: of each, {metric: float64 [groups, values]}; see `summaries.values_by_group`.
      seed: seed of the bootstrap, that of the first.
    """

    sides: list[str]
    scenes: list[BenchmarkScene]
    tables: list[dict[str, Float64[np.ndarray, "groups _"]]]
    seed: int


def compare(paths: Sequence[epath.PathLike]) -> dict[str, Any]:
    """Compares evaluations on the scenes that all of them have.

    Args:
      paths: two or more output folders of finished evaluations. The policy's scores are used, or
        the base's if there is no policy.

    Returns:
      {"columns": [{"folder", "side"}], "scenes": number of them,
       "metrics": {metric: {"estimates": [one per column], "differences": [estimates of each
       further column minus the first, on the same scenes]}}}.

    Raises:
      UserError: a folder is not a finished evaluation, or the metrics are not comparable.
    """
    if len(paths) < 2:
        raise UserError("--compare: give two or more output folders of evaluations.")
    sides, scenes, tables, seed = read(paths)
    metrics = {}
    for name in tables[0]:
        estimates = [
            statistics.bootstrap_mean(table[name], seed=seed)._asdict() for table in tables
        ]
        if any(estimate["n"] for estimate in estimates):
            metrics[name] = {
                "estimates": estimates,
                "differences": [
                    statistics.bootstrap_difference(
                        tables[0][name], table[name], seed=seed
                    )._asdict()
                    for table in tables[1:]
                ],
            }
    return {
        "columns": [{"folder": str(path), "side": side} for path, side in zip(paths, sides)],
        "scenes": len(scenes),
        "metrics": metrics,
    }


def read(paths: Sequence[epath.PathLike]) -> Compared:
    """Reads the scores of evaluations; see `compare` for the arguments and errors."""
    folders = [OutputFolder(path) for path in paths]
    results = [folder.read("results.json") for folder in folders]
    for folder, result in zip(folders, results):
        if not isinstance(result.get("settings"), dict) or "scores" not in result["settings"]:
            raise UserError(
                f"{folder.path}/results.json was not written by focusdpo_jax.evaluate; evaluate "
                "that run first."
            )
    for name in ("protocol", "probe"):
        values = [result["settings"].get(name) for result in results]
        for folder, value in zip(folders, values):
            if value != values[0]:
                raise UserError(
                    f"--compare: {folder.path} has another {name} ({value}) than "
                    f"{folders[0].path} ({values[0]}), and their values are not comparable; "
                    "evaluate with the same."
                )
    sides = ["policy" if "policy" in r["settings"]["scores"] else "base" for r in results]
    columns = []
    for folder, result, side in zip(folders, results, sides):
        scores = {
            name.partition("-")[0]: (name, folder.load_scores(side, name))
            for name in result["settings"]["scores"][side]
        }
        columns.append((folder, {s.name: s for s in folder.scenes()}, scores))
    scenes = _common(columns)
    kinds = set.intersection(*(set(scores) for *_, scores in columns))
    for kind in kinds:
        names = {scores[kind][0] for *_, scores in columns}
        if len(names) > 1:
            raise UserError(
                f"--compare: {kind} was measured with different weights "
                f"({', '.join(sorted(names))}); evaluate again with the same."
            )
    if not kinds:
        raise UserError("--compare: the folders have no metric in common.")
    seed = results[0]["settings"]["seed"]
    tables = [
        summaries.values_by_group(
            scenes, summaries.merge_scores(scores[kind][1] for kind in scores if kind in kinds)
        )
        for *_, scores in columns
    ]
    return Compared(sides, scenes, tables, seed)


def _common(
    columns: list[tuple[OutputFolder, dict[str, BenchmarkScene], dict]],
) -> list[BenchmarkScene]:
    """Returns the scenes that all columns have; raises UserError if two of one name differ."""
    first, known, _ = columns[0]
    scenes = [
        scene for name, scene in known.items() if all(name in others for _, others, _ in columns)
    ]
    if not scenes:
        raise UserError("--compare: the folders have no scene in common.")
    for folder, others, _ in columns[1:]:
        for scene in scenes:
            other = others[scene.name]
            if (other.prompt, other.group) != (scene.prompt, scene.group):
                raise UserError(
                    f"--compare: scene {scene.name} is {scene.prompt!r} in {first.path} and "
                    f"{other.prompt!r} in {folder.path}; evaluate the same benchmark."
                )
    return scenes


def format_comparison(compared: Mapping[str, Any]) -> str:
    """Formats the result of `compare` as text."""
    names = [column["folder"] for column in compared["columns"]]
    columns = [*names, *(f"{name} - {names[0]}" for name in names[1:])]
    rows = [
        (name, [*values["estimates"], *values["differences"]], len(values["differences"]))
        for name, values in compared["metrics"].items()
    ]
    return f"{compared['scenes']} scenes; mean and 95 % interval\n" + format_estimates(
        columns, rows
    )
