"""The report of `toybox_study.py`: a table, curves over the steps, and a page of images."""

import json
import pathlib
from typing import Any

import numpy as np

from focusdpo_jax.evaluation import statistics
from focusdpo_jax.toybox.metrics import LOWER_IS_BETTER
from focusdpo_jax.visualization import grids

SHOWN = (
    "fidelity",
    "leakage",
    "hue_leakage",
    "missing",
    "repeated",
    "class_accuracy",
    "background_accuracy",
)
CURVES = ("fidelity", "leakage")
# Arrays of a measurement that are no measures.
_ARRAYS = ("pictures", "chosen", "references", "present")


def load(trial: Any, output: pathlib.Path, step=None):
    """Loads a measurement of a trial, by default that of its last step.

    Returns:
      {name: array}, or None if the trial ended before that step.
    """
    step = trial.steps[-1] if step is None else step
    path = output / "trials" / trial.name / f"{trial.split}_{step:06d}.npz"
    if not path.exists():
        return None
    with np.load(path) as saved:
        return dict(saved)


def score(measures):
    """The criterion of the grid search: mean fidelity minus mean leakage."""
    means = {
        name: statistics.bootstrap_mean(measures[name], seed=0, resamples=1).mean for name in CURVES
    }
    # Both means are None if no subject is found in any image.
    return (means["fidelity"] or 0.0) - (means["leakage"] or 0.0)


def pooled(trials, output: pathlib.Path, step=None):
    """Measures of all seeds, concatenated: {name: [scenes, seeds * values per scene]}.

    The bootstrap resamples scenes; a scene contributes the values of all seeds.
    """
    loaded = [load(trial, output, step) for trial in trials]
    loaded = [measures for measures in loaded if measures is not None]
    return {
        name: np.concatenate([m[name].reshape(len(m[name]), -1) for m in loaded], axis=1)
        for name in (loaded[0] if loaded else {})
        if name not in _ARRAYS
    }


def estimates(trials, output: pathlib.Path, step=None):
    """Returns {measure: Estimate as a dict, with the mean of each seed as `seeds`}."""
    result = {}
    for name, values in pooled(trials, output, step).items():
        each = [load(trial, output, step) for trial in trials]
        result[name] = statistics.bootstrap_mean(values, seed=0)._asdict() | {
            "seeds": [
                statistics.bootstrap_mean(m[name], seed=0, resamples=1).mean
                for m in each
                if m is not None
            ]
        }
    return result


def differences(reported, output: pathlib.Path, against="focus_dpo"):
    """Returns {model: {measure: Estimate}} of each model's value less that of `against`.

    The differences are paired: all models generate the same scenes from the same noise.
    """
    if against not in reported:
        return {}
    first = pooled(reported[against], output)
    result = {}
    for name, trials in reported.items():
        second = pooled(trials, output)
        if name != against and first and second:
            result[name] = {
                measure: statistics.bootstrap_difference(first[measure], second[measure], seed=0)
                for measure in SHOWN
            }
    return result


def differences_by_seed(reported, output: pathlib.Path, against="focus_dpo"):
    """Returns {model: {measure: list of the differences of each seed}}, as `differences` pairs them.

    A seed has the same pairs in the same order for all models. Models without trials of the same
    seeds, such as the base, are left out.
    """
    result = {}
    for name, trials in reported.items():
        seeds = [trial.overrides.get("seed") for trial in trials]
        if name == against or seeds != [t.overrides.get("seed") for t in reported[against]]:
            continue
        of_seeds = [
            differences({against: [first], name: [second]}, output, against).get(name)
            for first, second in zip(reported[against], trials)
        ]
        result[name] = {
            measure: [found[measure].mean for found in of_seeds if found] for measure in SHOWN
        }
    return result


def difference_table(results, by_seed=None):
    """Formats a Markdown table of the result of `differences`, in points.

    The differences of each seed follow in parentheses, if `differences_by_seed` is given.
    """
    lines = [
        "| model | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |",
        "| --- |" + " --- |" * len(SHOWN),
    ]
    for model, measures in results.items():
        cells = []
        for name in SHOWN:
            estimate = measures[name]
            if estimate.mean is None:
                cells.append("-")
                continue
            mean, low, high = (100 * x for x in (estimate.mean, estimate.low, estimate.high))
            mark = ""
            if low > 0 or high < 0:
                mark = " +" if (mean < 0) == (name in LOWER_IS_BETTER) else " -"
            seeds = [x for x in (by_seed or {}).get(model, {}).get(name, []) if x is not None]
            seeds = f" ({'/'.join(f'{100 * x:+.1f}' for x in seeds)})" if seeds else ""
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{seeds}{mark}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(output: pathlib.Path, reported, chosen, scores, edges=()) -> None:
    """Writes study.json, study.md, curves.png and pictures.png into `output`.

    Args:
      reported: {name: list of Trial}, `base` first.
      chosen: {objective: setting}, selected by the grid search.
      scores: {trial: score} of the grid search.
      edges: chosen values at an end of their grid, in words.
    """
    results = {name: estimates(trials, output) for name, trials in reported.items()}
    curves = {
        name: {step: estimates(trials, output, step) for step in trials[0].steps}
        for name, trials in reported.items()
        if name in chosen
    }
    (output / "study.json").write_text(
        json.dumps(
            {
                "results": results,
                "curves": curves,
                "chosen": chosen,
                "grid": scores,
                "edges": list(edges),
            },
            indent=2,
            sort_keys=True,
        )
        + "\n"
    )
    plot(output / "curves.png", curves, results["base"])
    grids.save_png(output / "pictures.png", image_grid(output, reported, chosen))
    trial = next(iter(reported.values()))[0]
    text = table(results) + "\n"
    paired = differences(reported, output)
    if paired:
        text += (
            "\nEach model less `focus_dpo`, in points; paired 95 % bootstrap interval over scenes, "
            "and the difference of each seed. `+` and `-`: better and worse, with an interval that "
            "excludes 0.\n\n"
            f"{difference_table(paired, differences_by_seed(reported, output))}\n"
        )
    (output / "study.md").write_text(
        f"# Study\n\n{trial.scenes} test scenes of two and three subjects, "
        f"{max(map(len, reported.values()))} seeds; mean and 95 % bootstrap interval over scenes, "
        f"and the mean of each seed. `+` and `-`: better and worse than `focus_dpo`.\n\n{text}\n"
        + "".join(
            f"- {name}: "
            + ", ".join(f"{k} {v:g}" for k, v in setting.items() if k != "objective")
            + "\n"
            for name, setting in chosen.items()
        )
        + "".join(f"- at an end of its grid: {edge}\n" for edge in edges)
        + "\n![Fidelity and leakage against steps](curves.png)\n\n"
        "![References, chosen image, and the image of each model](pictures.png)\n"
    )
    print(text)
    print(f"Report: {output / 'study.md'}")


def table(results):
    """Formats a Markdown table of the results.

    `+` and `-` mark values that are better and worse than those of `focus_dpo`, with disjoint
    intervals.
    """
    lines = [
        "| model | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |",
        "| --- |" + " --- |" * len(SHOWN),
    ]
    focus = results.get("focus_dpo")
    for model, measures in results.items():
        if not measures:
            lines.append(f"| {model} |" + " loss not finite |" + " |" * (len(SHOWN) - 1))
            continue
        cells = []
        for name in SHOWN:
            estimate = measures[name]
            if not estimate["n"]:
                cells.append("-")
                continue
            mark = (
                ""
                if focus is None or model == "focus_dpo"
                else {"better": " +", "worse": " -", "": ""}[
                    compare_intervals(name, focus[name], estimate)
                ]
            )
            mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
            seeds = "/".join(
                f"{100 * value:.0f}" for value in estimate["seeds"] if value is not None
            )
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}] ({seeds}){mark}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare_intervals(name: str, first, second) -> str:
    """Returns whether the second estimate is "better", "worse", or "" if the intervals overlap."""
    if not first["n"] or not second["n"]:
        return ""
    if second["low"] > first["high"]:
        return "worse" if name in LOWER_IS_BETTER else "better"
    if second["high"] < first["low"]:
        return "better" if name in LOWER_IS_BETTER else "worse"
    return ""


def plot(path: pathlib.Path, curves, base) -> None:
    """Plots fidelity and leakage with their intervals against steps; step 0 is the base."""
    import matplotlib  # Imported here, so that trials can run without it.

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 4), sharex=True)
    for axis, name in zip(axes, CURVES):
        for model, points in curves.items():
            points = {0: base} | {step: point for step, point in points.items() if point}
            steps = [step for step, point in points.items() if point[name]["n"]]
            mean, low, high = (
                np.array([100 * points[step][name][key] for step in steps])
                for key in ("mean", "low", "high")
            )
            axis.plot(
                steps,
                mean,
                marker="o",
                markersize=3,
                label=model,
                linewidth=2.5 if model == "focus_dpo" else 1.2,
            )
            axis.fill_between(steps, low, high, alpha=0.12)
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel(f"{name}, %")
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(curves), frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def image_grid(output: pathlib.Path, reported, chosen):
    """Images of the same scenes from the same noise, by each model of the first seed."""
    measurements = {
        name: load(trials[0], output)
        for name, trials in reported.items()
        if name == "base" or name in chosen
    }
    base = measurements["base"]
    assert base is not None, "the base has no measurement"
    return grids.model_grid(
        [
            grids.ModelRow(
                base["references"][i][base["present"][i]],
                base["chosen"][i],
                {
                    name: None if values is None else values["pictures"][i]
                    for name, values in measurements.items()
                },
            )
            for i in range(len(base["pictures"]))
        ]
    )
