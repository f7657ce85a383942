r"""Every objective on Toybox under equal conditions: does FocusDPO do what it is for?

    python -m experiments.toybox_study --output=runs/study
    python -m experiments.toybox_study --output=runs/study --workers=8       # one a GPU or TPU chip
    python -m experiments.toybox_study --output=runs/study --share=0/4       # one of four machines

All start from one base and see the same pairs in the same order for the same number of steps.
Learning rate, and of preferences beta and the anchor on the chosen picture, come from one small
grid, trained with seed 0 and measured on validation scenes, by fidelity less leakage. What is
reported are other seeds and the test scenes: two and three subjects each, none of them trained on.
Ablations change one thing of FocusDPO at its own best setting.

Run the same line again to go on: a trial leaves a file for each measurement, and a training
resumes from its checkpoint. Machines that share `--output` take shares of the trials; each stops
when its share is done, and the line run after all are done writes the report. `study_trial.py` is
one trial, `study_report.py` the report: `study.md`, `curves.png`, `pictures.png`, `study.json`.
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

from experiments import study_report
from focusdpo_jax import objectives
from focusdpo_jax.errors import UserError

OBJECTIVES = ("sft", "dpo", "prior_dpo", "patch_dpo", "focus_dpo")
# One change each to `focus_dpo`.
ABLATIONS = {
    "spaf alone": {"focus.dpce": False},
    "dpce alone": {"focus.spaf": False},
    "features of the unet": {"focus.features": "unet"},
    "attention": {"focus.features": "attention"},
    "one bucket": {"focus.buckets": 1},
    "eight buckets": {"focus.buckets": 8},
    "gate always open": {"focus.tau": 0.0},
    "soft gate": {"focus.gate_width": 0.1},
    "rho constant": {"focus.rho_noisy": 0.6, "focus.rho_clean": 0.6},
    "rho small": {"focus.rho_noisy": 0.15, "focus.rho_clean": 0.45},
}
TUNING_SEED = 0
TUNED = ("learning_rate", "beta", "anchor")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training with its measurements.

    Attributes:
      name: of its folder.
      overrides: fields of the configuration, {name: value}.
      split, scenes: what is measured.
      steps: after how many steps, ascending.
    """

    name: str
    overrides: dict
    split: str
    scenes: int
    steps: tuple[int, ...]


def parse(arguments):
    """The command line as a namespace, with `share` as (place, count) and `common` overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def number(text):
        if int(text) < 1:
            raise ValueError
        return int(text)

    def assignment(text):
        name, _, value = text.partition("=")
        return name, json.loads(value)

    def share(text):
        place, count = map(int, text.split("/"))
        if not 0 <= place < count:
            raise ValueError
        return place, count

    add = parser.add_argument
    add("--output", type=pathlib.Path, default="runs/toybox_study", help="folder of the study")
    add("--config", default="configs/toybox_dpo.py", help="what all trials have in common")
    add(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a field that all trials have otherwise, such as batch_size=64",
    )
    add("--steps", type=number, default=80, help="optimiser steps of every trial")
    add("--points", type=number, default=4, help="points of the curves, a divisor of --steps")
    add("--seeds", type=number, default=3, help="seeds of what is reported")
    add("--scenes", type=number, default=512, help="test scenes of a measurement")
    add("--validation", type=number, default=192, help="validation scenes of a point of the grid")
    add("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    add("--ablations", nargs="*", choices=list(ABLATIONS), default=list(ABLATIONS))
    add("--learning_rates", nargs="+", type=float, default=[5e-4, 1.5e-3])
    add("--betas", nargs="+", type=float, default=[100.0, 1000.0])
    add("--anchors", nargs="+", type=float, default=[0.0, 1.0])
    add(
        "--workers",
        type=number,
        default=1,
        help="trials at once; with several, each sees one accelerator",
    )
    add(
        "--share",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="this machine takes every N-th trial from I on",
    )
    study = parser.parse_args(arguments)
    if study.steps % study.points:
        parser.error(f"--points={study.points}: give a divisor of --steps={study.steps}")
    # The reports are made of what trials measure, so the runs' own pictures are few.
    study.common = {
        "decay": "constant",
        "evaluation.scenes": 0,
        "evaluation.pictures": 1,
        "sample_every": 10**6,
    } | dict(study.set)
    return study


def tuning_trials(study: Any):
    """One trial for each point of an objective's grid; only preferences have beta and anchor."""
    for objective in study.objectives:
        grid = [study.learning_rates]
        if objectives.get(objective).needs_reference:
            grid += [study.betas, study.anchors]
        for point in itertools.product(*grid):
            setting = dict(zip(TUNED, point))
            yield Trial(
                f"tune_{objective}_{_tag(setting)}",
                study.common | setting | {"objective": objective, "seed": TUNING_SEED},
                "validation",
                study.validation,
                (study.steps,),
            )


def _tag(setting):
    """A tuned setting in a few letters, which make the name of a trial that of its setting."""
    return "_".join(f"{name[0]}{setting[name]:g}" for name in TUNED if name in setting)


def reported_trials(study: Any, chosen):
    """The base, each objective and each ablation at the chosen settings, on the test split.

    Args:
      chosen: {objective: setting}.

    Returns:
      {name in the report: list of Trial}, one a seed; of the base, which is not trained, one.
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
            for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + study.seeds)
        ]

    found = {"base": trials("test", "base", {}, (0,))[:1]}
    found |= {name: trials("test", name, chosen[name], steps) for name in study.objectives}
    for name in study.ablations if "focus_dpo" in chosen else []:
        found[name] = trials("ablation", name, chosen["focus_dpo"] | ABLATIONS[name], steps[-1:])
    return found


def spread(study: Any, trials):
    """Runs this machine's share of the trials that are not done yet, `study.workers` at once.

    Returns:
      Whether all of them, also other machines', are done now.
    """
    place, count = study.share
    todo = queue.SimpleQueue()
    for number, trial in enumerate(trials):
        if number % count == place and not done(trial, study.output):
            todo.put(trial)
    logging.info("%d trials, %d of them to do here", len(trials), todo.qsize())
    failed = []

    def work(worker):
        # Each worker sees one accelerator by whatever name its runtime goes by.
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
            (folder / "trial.json").write_text(
                json.dumps(dataclasses.asdict(trial) | {"config": study.config}, indent=2) + "\n"
            )
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

    threads = [threading.Thread(target=work, args=(i,)) for i in range(study.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise UserError(
            f"{len(failed)} trials failed, see {failed[0]}/log.txt. Run the same line "
            "again to go on."
        )
    return all(done(trial, study.output) for trial in trials)


def done(trial: Any, output: pathlib.Path):
    """Whether all measurements of a trial are there, or its training was given up."""
    folder = output / "trials" / trial.name
    return (folder / "gave_up.txt").exists() or all(
        (folder / f"{trial.split}_{step:06d}.npz").exists() for step in trial.steps
    )


def choose(study: Any, trials):
    """The best setting of each objective, {objective: setting}, and {trial's name: score}."""
    best, scores = {}, {}
    for trial in trials:
        measures = study_report.load(trial, study.output)
        if measures is None:  # Its loss was no longer finite.
            continue
        score = scores[trial.name] = study_report.score(measures)
        objective = trial.overrides["objective"]
        if objective not in best or score > scores[best[objective].name]:
            best[objective] = trial
    lost = set(study.objectives) - set(best)
    if lost:
        raise UserError(
            f"no setting of {', '.join(sorted(lost))} stayed finite: give lower --learning_rates"
        )
    return {
        objective: {
            name: trial.overrides[name] for name in ("objective", *TUNED) if name in trial.overrides
        }
        for objective, trial in best.items()
    }, scores


def main(arguments=None) -> None:
    """Tunes, trains, measures and reports."""
    study = parse(arguments)
    tuning = list(tuning_trials(study))
    if not spread(study, tuning):
        logging.info("other machines are still tuning; run this line again when they are done")
        return
    chosen, scores = choose(study, tuning)
    reported = reported_trials(study, chosen)
    if not spread(study, [trial for trials in reported.values() for trial in trials]):
        logging.info("other machines are still training; run this line again when they are done")
        return
    study_report.write(study.output, reported, chosen, scores)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
