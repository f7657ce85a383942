r"""Compares objectives on Toybox under equal conditions.

    python -m experiments.toybox_study --output=runs/study
    python -m experiments.toybox_study --output=runs/study --workers=8    # one per GPU or TPU chip
    python -m experiments.toybox_study --output=runs/study --share=0/4    # one of four machines

All trainings start from the same base and use the same pairs in the same order for the same number
of steps. A small grid search on validation scenes selects the learning rate, and for preference
objectives also beta and the anchor, by fidelity minus leakage; a selected value at the end of its
grid is reported. Preference objectives use `config.match_beta`, so that one beta means the same for
all. Results are reported for other seeds and for test scenes, with two and three subjects that do
not occur in training, with paired differences. Each ablation changes one setting of FocusDPO at its
best grid point.

Run the same command again to resume after an interruption: a trial writes a file for each
measurement, and its training resumes from a checkpoint. Machines that share `--output` can each run
a share of the trials (`--share`) and stop when it is done. Once all are done, the same command
writes the report.

`study_trial.py` runs one trial. `study_report.py` writes the report: `study.md`, `curves.png`,
`pictures.png` and `study.json`.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from typing import Any

from absl import logging

from experiments import study_report, study_trial
from focusdpo_jax import objectives
from focusdpo_jax.errors import UserError

OBJECTIVES = ("sft", "dpo", "prior_dpo", "patch_dpo", "focus_dpo")
# The change of each ablation to `focus_dpo`.
ABLATIONS = {
    "spaf alone": {"focus.dpce": False},
    "dpce alone": {"focus.spaf": False},
    # The weights of prior_dpo, with focus_dpo's timesteps: all pairs of a step from one bucket.
    "mask in four buckets": {"focus.lambda_s": 0.0, "focus.lambda_d": 0.0, "focus.matched": 1.0},
    "features of the unet": {"focus.features": "unet"},
    "attention": {"focus.features": "attention"},
    "one bucket": {"focus.buckets": 1},
    # A step uses every bucket once, with as many pairs in total.
    "all buckets in a step": {"accumulate": 4, "batch_size": 4},
    "eight buckets": {"focus.buckets": 8},
    "gate always open": {"focus.tau": 0.0},
    "soft gate": {"focus.gate_width": 0.1},
    "rho constant": {"focus.rho_noisy": 0.6, "focus.rho_clean": 0.6},
    "rho small": {"focus.rho_noisy": 0.15, "focus.rho_clean": 0.45},
    "own subject": {"focus.own_subject": True},
    "coverage": {"focus.coverage": True},
    "confidence": {"focus.lambda_c": 2.0},
    "contrast": {"focus.background": 0.0, "focus.matched": 0.0, "focus.lambda_s": 4.0},
    "attention of the policy": {"focus.features": "attention", "focus.observed": "policy"},
    "colour and reference detail": {"focus.detail_colour": True, "focus.reference_detail": True},
}
TUNED = ("learning_rate", "beta", "anchor")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training with its measurements.

    Attributes:
      name: of the trial's folder.
      overrides: fields of the configuration, {name: value}.
      split: "validation" or "test".
      scenes: number of measured scenes.
      steps: steps at which the model is measured, ascending.
    """

    name: str
    overrides: dict
    split: str
    scenes: int
    steps: tuple[int, ...]


def parse(arguments):
    """Parses the command line; `share` is (index, count), `common` the overrides of all trials."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def positive_integer(text):
        if int(text) < 1:
            raise ValueError
        return int(text)

    def share(text):
        index, count = map(int, text.split("/"))
        if not 0 <= index < count:
            raise ValueError
        return index, count

    add = parser.add_argument
    add("--output", type=pathlib.Path, default="runs/toybox_study", help="folder of the study")
    study_trial.add_config_arguments(parser)
    add("--steps", type=positive_integer, default=80, help="optimiser steps of every trial")
    add(
        "--points",
        type=positive_integer,
        default=4,
        help="measured points per curve, a divisor of --steps",
    )
    add("--seeds", type=positive_integer, default=3, help="number of reported seeds")
    add("--tuning_seeds", type=positive_integer, default=1, help="seeds of the grid search")
    add("--scenes", type=positive_integer, default=512, help="test scenes per measurement")
    add("--validation", type=positive_integer, default=192, help="validation scenes per grid point")
    add("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    add("--ablations", nargs="*", choices=list(ABLATIONS), default=list(ABLATIONS))
    add("--learning_rates", nargs="+", type=float, default=[5e-4, 1.5e-3])
    add("--betas", nargs="+", type=float, default=[100.0, 1000.0])
    add("--anchors", nargs="+", type=float, default=[0.0, 1.0])
    add(
        "--workers",
        type=positive_integer,
        default=1,
        help="trials run at once; with several, each uses one accelerator",
    )
    add(
        "--share",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="run every N-th trial, starting at I",
    )
    study = parser.parse_args(arguments)
    if study.steps % study.points:
        parser.error(f"--points={study.points}: give a divisor of --steps={study.steps}")
    # Trials are measured by `study_trial`, so the runs generate as few images as possible.
    study.common = {
        "decay": "constant",
        "evaluation.scenes": 0,
        "evaluation.pictures": 1,
        "sample_every": 10**6,
        "match_beta": True,
    } | dict(study.set)
    return study


def tuning_trials(study: Any):
    """Yields a trial per grid point and seed; only preference objectives have beta and anchor."""
    for objective in study.objectives:
        grid = [study.learning_rates]
        if objectives.get(objective).needs_reference:
            grid += [study.betas, study.anchors]
        for point in itertools.product(*grid):
            setting = dict(zip(TUNED, point))
            for seed in range(study.tuning_seeds):
                yield Trial(
                    f"tune_{objective}_{_tag(setting)}" + (f"_s{seed}" if seed else ""),
                    study.common | setting | {"objective": objective, "seed": seed},
                    "validation",
                    study.validation,
                    (study.steps,),
                )


def _tag(setting):
    """Abbreviates a tuned setting for the name of a trial."""
    return "_".join(f"{name[0]}{setting[name]:g}" for name in TUNED if name in setting)


def reported_trials(study: Any, chosen):
    """Trials on the test split: the base, the objectives and the ablations, at the chosen settings.

    Args:
      chosen: {objective: setting}.

    Returns:
      {name in the report: list of Trial}, one per seed, but one in total for the base.
    """
    gap = study.steps // study.points
    steps = tuple(range(gap, study.steps + 1, gap))

    def trials(kind, name, setting, steps):
        parts = [kind, name.replace(" ", "_"), *filter(None, [_tag(setting)])]
        return [
            Trial(
                "_".join([*parts, f"s{seed}"]),
                study.common | setting | {"seed": seed},
                "test",
                study.scenes,
                steps,
            )
            for seed in range(study.tuning_seeds, study.tuning_seeds + study.seeds)
        ]

    trials_by_name = {"base": trials("test", "base", {}, (0,))[:1]}
    trials_by_name |= {name: trials("test", name, chosen[name], steps) for name in study.objectives}
    for name in study.ablations if "focus_dpo" in chosen else []:
        setting = chosen["focus_dpo"] | ABLATIONS[name]
        trials_by_name[name] = trials("ablation", name, setting, steps[-1:])
    return trials_by_name


def run_trials(study: Any, trials):
    """Runs this machine's share of the unfinished trials, `study.workers` at once.

    Returns:
      Whether all trials are done, including those of other machines.

    Raises:
      UserError: a trial failed.
    """
    index, count = study.share
    todo = queue.SimpleQueue()
    for i, trial in enumerate(trials):
        if i % count == index and not done(trial, study):
            todo.put(trial)
    logging.info("%d trials, %d to run on this machine", len(trials), todo.qsize())
    failed = []

    def run_worker(worker):
        # One accelerator per worker; the variable depends on the kind of accelerator.
        environment = {"JAX_COMPILATION_CACHE_DIR": str(study.output / "compiled")} | os.environ
        if study.workers > 1:
            environment |= {
                "CUDA_VISIBLE_DEVICES": str(worker),
                "TPU_VISIBLE_CHIPS": str(worker),
                "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
                "TPU_PROCESS_BOUNDS": "1,1,1",
            }
        while True:
            try:
                trial = todo.get_nowait()
            except queue.Empty:
                return
            folder = study.output / "trials" / trial.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trial.json").write_text(json.dumps(_settings(trial, study), indent=2) + "\n")
            logging.info("trial %s, %d left", trial.name, todo.qsize())
            with (folder / "log.txt").open("a") as log:
                code = subprocess.run(
                    [sys.executable, "-m", "experiments.study_trial", folder],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                ).returncode
            if code:
                failed.append(folder)

    threads = [threading.Thread(target=run_worker, args=(i,)) for i in range(study.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise UserError(
            f"{len(failed)} trials failed, see {failed[0]}/log.txt. Run the same "
            "command again to resume."
        )
    return all(done(trial, study) for trial in trials)


def done(trial: Trial, study: Any) -> bool:
    """Whether a trial has all its measurements, or ended because its loss was not finite.

    Raises:
      UserError: its folder has measurements with other settings.
    """
    folder = study.output / "trials" / trial.name
    gave_up = (folder / "gave_up.txt").exists()
    if gave_up or any(folder.glob("*.npz")):
        # The measured steps may differ: later ones prolong the training.
        saved, settings = (
            {name: value for name, value in values.items() if name != "steps"}
            for values in (json.loads((folder / "trial.json").read_text()), _settings(trial, study))
        )
        if saved != settings:
            raise UserError(
                f"{folder} has measurements of a trial with other settings ({folder}/trial.json); "
                "give another --output"
            )
    return gave_up or all(
        (folder / f"{trial.split}_{step:06d}.npz").exists() for step in trial.steps
    )


def _settings(trial, study):
    """The content of `trial.json`."""
    return json.loads(json.dumps(dataclasses.asdict(trial) | {"config": study.config}))


def choose(study: Any, trials):
    """Returns the best setting of each objective, {objective: setting}, and {trial name: score}.

    The score of a setting is the mean over the tuning seeds; a loss that is not finite excludes it.
    """
    by_setting, scores = {}, {}
    for trial in trials:
        measures = study_report.load(trial, study.output)
        score = -float("inf") if measures is None else study_report.score(measures)
        if measures is not None:
            scores[trial.name] = score
        setting = tuple(trial.overrides.get(name) for name in ("objective", *TUNED))
        by_setting.setdefault(setting, []).append((score, trial))
    best, means = {}, {}
    for (objective, *_), results in by_setting.items():
        mean = sum(score for score, _ in results) / len(results)
        if mean > means.get(objective, -float("inf")):
            best[objective], means[objective] = results[0][1], mean
    unstable = set(study.objectives) - set(best)
    if unstable:
        raise UserError(
            f"the loss of {', '.join(sorted(unstable))} is not finite for any setting: give lower "
            "--learning_rates"
        )
    return {
        objective: {
            name: trial.overrides[name] for name in ("objective", *TUNED) if name in trial.overrides
        }
        for objective, trial in best.items()
    }, scores


def at_the_edge(study: Any, chosen) -> list[str]:
    """Returns the chosen values at an end of their grid, such as "focus_dpo: learning_rate 0.001".

    Grids of a single value are left out.
    """
    grids = dict(zip(TUNED, (study.learning_rates, study.betas, study.anchors), strict=True))
    return [
        f"{objective}: {name} {setting[name]:g}"
        for objective, setting in chosen.items()
        for name, grid in grids.items()
        if name in setting and len(grid) > 1 and setting[name] in (min(grid), max(grid))
    ]


def main(arguments=None) -> None:
    """Tunes, trains, measures and reports."""
    study = parse(arguments)
    tuning = list(tuning_trials(study))
    if not run_trials(study, tuning):
        logging.info("other machines are still tuning; run this command again when they are done")
        return
    chosen, scores = choose(study, tuning)
    edges = at_the_edge(study, chosen)
    if edges:
        logging.warning("at an end of their grid, so give more values: %s", "; ".join(edges))
    reported = reported_trials(study, chosen)
    if not run_trials(study, [trial for trials in reported.values() for trial in trials]):
        logging.info("other machines are still training; run this command again when they are done")
        return
    study_report.write(study.output, reported, chosen, scores, edges)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
