r"""Tests whether FocusDPO's weight map matters on Toybox, in the order in which evidence must come.

    python -m experiments.evidence --output=runs/evidence

1. `gate`: cosines of the gradients at the base (`experiments.gradients`). A weight map whose
   gradient hardly differs from that of the plain mask cannot be told from it by training.
2. `oracle`: the plain mask against the truth, the mask of the pixels that a changed attribute
   affects (`config.data.oracle_mask`). It is the upper limit of what a weight map can gain. If the
   oracle is not better, the testbed cannot discriminate, and the script stops.
3. `methods`: all objectives and options of the weight map.

Stages 2 and 3 train every method with the same pairs in the same order for the same number of
steps, and compare them by the teacher-forced measure (`experiments.teacher_forced`) on held-out
pairs. Differences have paired bootstrap intervals over pairs; values of all seeds belong to their
pair. The pairs resemble those of real data: the prior mask is generous, every rejected image has an
artefact of inpainting in all of its mask, and half of the subjects differ in only one attribute.
All preference objectives use `config.match_beta`; what remains of the difference in strength is
removed by dividing beta by the norm of the method's gradient over that of dpo, the mean over the
buckets of stage 1. Stage 1 may have been run with other settings (--set) than the trials; the log
then states them.

Results are stored per trial in --output. The same command resumes. gate.json and evidence.md
contain the tables.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import logging

from experiments import gradients, study_trial, teacher_forced
from focusdpo_jax import config as config_lib
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.statistics import bootstrap_difference, bootstrap_mean
from focusdpo_jax.evaluation.tables import aligned
from focusdpo_jax.files import replace_file
from focusdpo_jax.training import loop, models, runs

STAGES = ("gate", "oracle", "methods")
# Fields that all trials share, unless --set replaces them.
TESTBED = {
    "data.prior_mask": "dilated",
    "data.nuisance_probability": 1.0,
    "data.one_look_probability": 0.5,
    "match_beta": True,
    "learning_rate": 1e-3,
    "evaluation.scenes": 0,
    "evaluation.pictures": 0,
    "sample_every": 0,
    "checkpoint_every": 0,
}
PRIOR, ORACLE = "prior_dpo", "oracle"
# A step of focus_dpo uses every bucket once, with as many pairs in total as a step of the others.
_ALL_BUCKETS = {"accumulate": 4, "batch_size": 4}
_CONTRAST = {"focus.background": 0.0, "focus.matched": 0.0, "focus.lambda_s": 4.0}
_ATTENTION = {"focus.features": "attention", "focus.coverage": True}
# The fields of each method.
METHODS = {
    "dpo": {"objective": "dpo"},
    PRIOR: {"objective": "prior_dpo"},
    ORACLE: {"objective": "prior_dpo", "data.oracle_mask": True},
    "sft": {"objective": "sft"},
    "patch_dpo": {"objective": "patch_dpo"},
    "focus_dpo": _ALL_BUCKETS,
    "one bucket in a step": {},
    "one bucket": {"focus.buckets": 1},
    "spaf alone": _ALL_BUCKETS | {"focus.dpce": False},
    "dpce alone": _ALL_BUCKETS | {"focus.spaf": False},
    "own_subject": _ALL_BUCKETS | {"focus.own_subject": True},
    "coverage": _ALL_BUCKETS | {"focus.coverage": True},
    "confidence": _ALL_BUCKETS | {"focus.lambda_c": 2.0},
    "contrast": _ALL_BUCKETS | _CONTRAST,
    "coverage, contrast": _ALL_BUCKETS | _CONTRAST | {"focus.coverage": True},
    "colour, reference detail": _ALL_BUCKETS
    | {"focus.detail_colour": True, "focus.reference_detail": True},
    "attention, coverage": _ALL_BUCKETS | _ATTENTION,
    "attention of the policy, coverage": _ALL_BUCKETS | _ATTENTION | {"focus.observed": "policy"},
}
# Methods whose loss has no margin, and so no beta.
WITHOUT_MARGIN = ("sft", "patch_dpo")
# The largest cosine with the plain mask at which a weight map is worth training.
GATE = 0.9
# Shown for every method; the first decides. (Region, quantity.)
SHOWN = (
    ("changed", "gain"),
    ("changed", "winner"),
    ("subject", "gain"),
    ("subject", "winner"),
    ("background", "winner"),
)


def parse(arguments):
    """Parses the command line; `common` are the overrides of all trials."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    add = parser.add_argument
    add("--output", type=pathlib.Path, default="runs/evidence", help="folder of the results")
    study_trial.add_config_arguments(parser)
    add("--stages", nargs="+", choices=STAGES, default=STAGES)
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--steps", type=int, default=80, help="optimiser steps of every trial")
    add("--seeds", type=int, default=2, help="trainings of every method")
    add("--pairs", type=int, default=512, help="held-out pairs, a multiple of 32")
    add("--gradient_pairs", type=int, default=64, help="training pairs of the gate, even")
    add("--split", choices=["validation", "test"], default="validation")
    evidence = parser.parse_args(arguments)
    if evidence.pairs < 32 or evidence.pairs % 32:
        parser.error(f"--pairs={evidence.pairs}: give a multiple of 32")
    evidence.common = TESTBED | {"steps": evidence.steps} | dict(evidence.set)
    return evidence


def gate(evidence: Any) -> bool:
    """Prints the gradients' cosines; returns whether a weight map passes in every bucket.

    Raises:
      UserError: the folder has gradients of other settings.
    """
    names = [name for name in evidence.methods if name not in WITHOUT_MARGIN]
    names = list(dict.fromkeys(["dpo", PRIOR, ORACLE, *names]))
    settings, saved = gate_settings(evidence), load_gate(evidence)
    results = saved.get("buckets", {})
    if results and saved["settings"] != settings:
        raise UserError(
            f"{_gate_path(evidence)} has gradients of {_difference(saved['settings'], settings)}; "
            "give another --output"
        )
    if not results or any(name not in rows for rows in results.values() for name in names):
        config = study_trial.load_config(evidence.config, evidence.common)
        results = gradients.compare(
            config, {name: METHODS[name] for name in names}, pairs=evidence.gradient_pairs, seed=0
        )
        content = json.dumps({"settings": settings, "buckets": results}, indent=2)
        replace_file(_gate_path(evidence), content + "\n")
    print(gradients.format_table(results))
    passing = [
        name
        for name in names
        if name not in ("dpo", PRIOR, ORACLE)
        and all(rows[name]["prior_dpo"] < GATE for rows in results.values() if name in rows)
    ]
    print(f"\nCosine with {PRIOR} below {GATE} in every bucket: {', '.join(passing) or 'none'}\n")
    return bool(passing)


def gate_settings(evidence: Any) -> dict:
    """Returns what the gradients of the gate depend on, besides the method."""
    fields = {name: value for name, value in evidence.common.items() if name != "steps"}
    settings = {"config": evidence.config, "gradient_pairs": evidence.gradient_pairs, **fields}
    return json.loads(json.dumps(settings))  # Tuples become lists, as in the file.


def load_gate(evidence: Any) -> dict:
    """Returns the gate's file, {"settings": ..., "buckets": {bucket: {method: row}}}, or {}."""
    path = _gate_path(evidence)
    return json.loads(path.read_text()) if path.exists() else {}


def _gate_path(evidence):
    return evidence.output / "gate.json"


def _difference(saved, settings):
    """The settings that differ, as text: "anchor = 1.0 (now 4.0)"."""
    names = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
    return ", ".join(f"{name} = {saved.get(name)} (now {settings.get(name)})" for name in names)


def relative_norm(evidence: Any, name: str) -> float:
    """Returns the mean over buckets of a method's gradient norm over dpo's; 1 without a margin.

    Raises:
      UserError: the gate has not measured it.
    """
    if name in WITHOUT_MARGIN:
        return 1.0
    rows = load_gate(evidence).get("buckets", {}).values()
    norms = [methods[name]["norm"] for methods in rows if name in methods]
    if not norms:
        raise UserError(
            f"{_gate_path(evidence)} has no gradient of {name}, whose norm sets its beta; run "
            "--stages gate first, with the same --methods"
        )
    return float(np.mean(norms))


class Trials:
    """Trains methods and measures them, each once."""

    def __init__(self, evidence: Any):
        self._evidence = evidence
        saved, settings = load_gate(evidence).get("settings"), gate_settings(evidence)
        if saved and saved != settings:
            logging.info("beta is set by gradients at %s", _difference(saved, settings))

    def changes(self, name: str) -> dict[str, np.ndarray]:
        """Returns `teacher_forced.changes` of a method: {name: [pairs, seeds, timesteps, regions]}."""
        seeds = [self._one(name, seed) for seed in range(self._evidence.seeds)]
        return {key: np.stack([s[key] for s in seeds], axis=1) for key in seeds[0]}

    def _one(self, name, seed):
        folder = (
            self._evidence.output / "trials" / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}"
        )
        config = study_trial.load_config(
            self._evidence.config, self._evidence.common | METHODS[name] | {"seed": seed}
        )
        norm = relative_norm(self._evidence, name)
        # The anchor's term, which is proportional to beta, stays the same.
        config = dataclasses.replace(config, beta=config.beta / norm, anchor=config.anchor * norm)
        path = folder / f"{self._evidence.split}_{self._evidence.pairs}.npz"
        if path.exists():
            _check_settings(folder, config)
        else:
            logging.info("%s, seed %d: beta %.4g", name, seed, config.beta)
            loop.run(config, folder / "run")
            policy = runs.Run(folder / "run").policy()
            held_out, base = self._measured
            maps = teacher_forced.error_maps(config, policy, policy.parameters, held_out)
            study_trial.save(path, teacher_forced.changes(maps, base, held_out.regions))
        with np.load(path) as saved:
            return dict(saved)

    @functools.cached_property
    def _measured(self):
        """The held-out pairs, and the error maps of the base."""
        config = study_trial.load_config(self._evidence.config, self._evidence.common)
        base = models.load_model(config)
        held_out = teacher_forced.open_pairs(
            config, base, split=self._evidence.split, count=self._evidence.pairs
        )
        return held_out, teacher_forced.error_maps(config, base, base.parameters, held_out)


def _check_settings(folder: pathlib.Path, config: Any) -> None:
    """Refuses results of other settings."""
    saved = json.loads((folder / "run" / "config.json").read_text())
    changed = config_lib.changed_fields(saved, config_lib.to_dict(config))
    # A run may be prolonged; a measured one has the steps that it was measured at.
    if saved["steps"] != config.steps:
        changed = [*changed, f"config.steps = {saved['steps']} (now {config.steps})"]
    if changed:
        raise UserError(f"{folder} has results of {changed[0]}; give another --output")


def table(results, names, against):
    """Returns rows of text: each method's measures, and its differences from `against`."""

    def values(name, region, quantity):
        selected = results[name][quantity][..., teacher_forced.REGIONS.index(region)]
        return selected.reshape(len(selected), -1)

    def shown(estimate, signed=False):
        sign = "+" if signed else ""
        return f"{estimate.mean:{sign}.2f} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"

    rows = [["method", *(f"{quantity}, {region}" for region, quantity in SHOWN)]]
    for name in names:
        rows.append([name, *(shown(bootstrap_mean(values(name, *key), seed=0)) for key in SHOWN)])
    rows.append([f"less {against}"])
    for name in names:
        if name != against:
            rows.append(
                [
                    name,
                    *(
                        shown(
                            bootstrap_difference(values(against, *key), values(name, *key), seed=0),
                            signed=True,
                        )
                        for key in SHOWN
                    ),
                ]
            )
    width = len(rows[0])
    return [row + [""] * (width - len(row)) for row in rows]


def oracle(trials: Trials) -> bool:
    """Prints the oracle against the plain mask; returns whether the oracle is better."""
    results = {name: trials.changes(name) for name in (PRIOR, ORACLE)}
    print(aligned(table(results, [PRIOR, ORACLE], PRIOR)))
    changed = teacher_forced.REGIONS.index("changed")
    first, second = (
        results[name]["gain"][..., changed].reshape(len(results[name]["gain"]), -1)
        for name in (PRIOR, ORACLE)
    )
    better = (bootstrap_difference(first, second, seed=0).low or 0) > 0
    print(
        "\nThe oracle gains "
        + ("more than" if better else "no more than")
        + " the plain mask where attributes were changed: the testbed can"
        + ("" if better else "not")
        + " tell weight maps apart.\n"
    )
    return better


def main(arguments=None) -> None:
    """Runs the stages."""
    evidence = parse(arguments)
    evidence.output.mkdir(parents=True, exist_ok=True)
    # The programs of equal methods and buckets are compiled once.
    jax.config.update("jax_compilation_cache_dir", str(evidence.output / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    trials = Trials(evidence)
    if "gate" in evidence.stages and not gate(evidence):
        raise UserError(
            "no weight map passes the gate: they cannot be told from the plain mask; change --set"
        )
    if "oracle" in evidence.stages and not oracle(trials):
        raise UserError(
            "the oracle is not better than the plain mask: the testbed cannot tell weight maps "
            "apart; change --set, or give more --steps or --pairs"
        )
    if "methods" in evidence.stages:
        results = {name: trials.changes(name) for name in evidence.methods}
        against = PRIOR if PRIOR in results else evidence.methods[0]
        rows = table(results, evidence.methods, against)
        print(aligned(rows))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        replace_file(evidence.output / "evidence.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
