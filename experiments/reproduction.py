"""The parts of launch/reproduce.sh that are no command of the package.

    python -m experiments.reproduction split --dreambench=DIR --lists=DIR --output=DIR ...
    python -m experiments.reproduction time --plan="python -m focusdpo_jax.plan ... --json" ...
    python -m experiments.reproduction table --output=DIR --runs dpo-0 focus_dpo-0

`split` selects the prompts to evaluate, and writes a manifest of photographs for `disrupt`. `time`
prints a plan's memory and the time of the whole study. `table` compares all evaluations with their
base and with published results. docs/reproduce.md describes the study.
"""

import argparse
import json
import shlex
import subprocess
from typing import Any

import numpy as np
from etils import epath

from focusdpo_jax import command
from focusdpo_jax.data import dreambench
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation import comparison, metric_names, statistics, tables
from focusdpo_jax.evaluation.output_folder import OutputFolder
from focusdpo_jax.files import replace_file

# UNO's lists, by the name of the evaluation.
LISTS = {"single": "dreambench_singleip.json", "multi": "dreambench_multiip.json"}
# (evaluation, heading, metrics) of the table.
SECTIONS = (
    ("single", "one subject, all photographs", ("dino", "clip_i", "clip_t")),
    ("one", "one subject, its reference", ("dino", "clip_i", "clip_t")),
    (
        "multi",
        "two subjects, all photographs",
        ("dino", "clip_i", "clip_t", "dinov2_crop", "dinov2_leakage", "missing"),
    ),
)
# Results of arXiv 2412.03177 (PatchDPO) on all 30 subjects, by evaluation.
PUBLISHED = {
    "IP-Adapter-Plus, published": {"single": (0.692, 0.826, 0.281)},
    "PatchDPO, published": {"single": (0.727, 0.838, 0.292), "one": (0.831, 0.880, 0.288)},
}
# Share of the candidates' denoising steps that `disrupt` runs (its defaults).
DISRUPT_STEPS = 8 * 0.75


def split(
    dreambench_folder: str,
    lists: str,
    output: str,
    train_subjects: list[str] | None,
    segmented: bool,
) -> None:
    """Writes OUTPUT/single.json and multi.json, and OUTPUT/train with a manifest for `disrupt`.

    Args:
      dreambench_folder: DreamBench's dataset folder.
      lists: folder of `LISTS`.
      output: output folder.
      train_subjects: subjects to train on, whose prompts are left out; None writes no manifest.
      segmented: whether photographs without a mask are used too; `disrupt` then finds the masks.

    Raises:
      UserError: a file or a subject is missing, or a list has no prompt left.
    """
    folder, target = epath.Path(dreambench_folder), epath.Path(output)
    for name, file in LISTS.items():
        entries = _read_list(epath.Path(lists) / file)
        kept = [
            entry
            for entry in entries
            if not {epath.Path(p).parts[-2] for p in entry["image_paths"]}
            & {*(train_subjects or ())}
        ]
        if not kept:
            raise UserError(
                f"{lists}/{file}: every prompt has one of the training subjects; give fewer "
                "TRAIN_SUBJECTS"
            )
        replace_file(target / f"{name}.json", json.dumps(kept, indent=1) + "\n")
        print(f"{name}: {len(kept)} of {len(entries)} prompts are evaluated")
    if train_subjects is not None:
        count = _write_scenes(folder, target / "train", train_subjects, segmented)
        print(f"{count} photographs of {len(train_subjects)} subjects to train on: {target}/train")


def _read_list(path: epath.Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"LISTS: {path} cannot be read ({error.strerror or error}); give the folder datasets "
            "of github.com/bytedance/UNO"
        ) from error
    except ValueError as error:
        raise UserError(f"LISTS: {path} is not JSON: {error}") from error


def _write_scenes(
    folder: epath.Path, target: epath.Path, subjects: list[str], segmented: bool
) -> int:
    """Writes scenes.jsonl with copies of its images; returns the number of lines."""
    listings = [p / "prompts_and_classes.txt" for p in (folder, folder.parent)]
    listing = next((path.read_text() for path in listings if path.exists()), "")
    classes, lines = dreambench.classes(listing, subjects), []
    for subject in subjects:
        if not (folder / subject).is_dir():
            raise UserError(f"TRAIN_SUBJECTS: {folder} has no folder {subject}")
        photos = sorted(
            path
            for path in (folder / subject).iterdir()
            if dreambench.PHOTO.match(path.name)
            and (segmented or dreambench.mask_path(path).exists())
        )
        if not photos:
            raise UserError(
                f"TRAIN_SUBJECTS: {folder / subject} has no photograph with a NN_mask.png; add "
                "masks, or give SEGMENTER"
            )
        phrase = dreambench.with_article(classes[subject])
        for i, photo in enumerate(photos):
            described = {"phrase": phrase, **_files(photo, target, "mask")}
            chosen = described.pop("")
            if len(photos) > 1:  # A single photograph's reference is its cut-out.
                other = _files(photos[(i + 1) % len(photos)], target, "reference_mask")
                described |= {"reference": other.pop(""), **other}
            lines.append(
                {
                    "caption": f"a photo of {phrase}",
                    "group": subject,
                    "chosen": chosen,
                    "subjects": [described],
                }
            )
    replace_file(target / "scenes.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _files(photo: epath.Path, target: epath.Path, field: str) -> dict[str, str]:
    """Copies a photograph and its mask; returns {"": photograph, field: mask if there is one}."""
    names = {}
    for name, path in (("", photo), (field, dreambench.mask_path(photo))):
        if path.exists():
            names[name] = f"{photo.parent.name}/{path.name}"
            replace_file(target / names[name], path.read_bytes())
    return names


def time(plan: str, steps: int, runs: int, samples: int) -> None:
    """Prints the memory of a plan and the time of the study, as comments of the script.

    Args:
      plan: command that prints the plan of a training as JSON.
      steps: optimiser steps of a training.
      runs: number of trainings.
      samples: images of each prompt.
    """
    done = subprocess.run(shlex.split(plan), capture_output=True, text=True, check=False)
    try:
        made = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["no output"]
        print(f"# no plan: {lines[-1]}")
        print("# TPUs need pip install -e '.[plan]', GPUs pip install -e '.[plan-gpu]'")
        return
    limit = made["bytes_per_chip"]["limit"]
    for name, program in made["programs"].items():
        peak = program["peak"]
        print(
            f"# {name}: "
            + (f"{peak / 1e9:.1f} GB" if peak else "more memory")
            + (f" of {limit / 1e9:.1f}" if limit else "")
            + (", does NOT fit" if program["fits"] is False else "")
        )
    seconds = made["seconds_per_batch"]
    if seconds is None:
        print(f"# the speed of {made['chip']} is unknown")
        return
    training = steps * made["accumulate"] * seconds / 3600
    sampling = made["programs"].get("sampling", {})
    if "estimate" not in sampling:
        print(
            f"# ESTIMATE, not measured ({made['speed_from']}): {training:.1f} h for each of {runs} "
            "trainings; sampling is not planned, or does not fit"
        )
        return
    speed = made["flops_per_pair"] * made["batch_size"] / seconds / made["chips"]
    image = sampling["estimate"]["matmul_flops"] / speed / sampling["rows_per_chip"]
    prompts = 2 * 750 * samples
    print(
        f"# ESTIMATE, not measured ({made['speed_from']}): {training:.1f} h for each of {runs} "
        f"trainings; {image:.1f} s for an image, {prompts * image / 3600:.1f} h for each of "
        f"{runs + 1} evaluations of at most {prompts} images; "
        f"{DISRUPT_STEPS * image / 60:.1f} min for a disrupted subject, longer in float32"
    )
    print(
        f"# together {training * runs + prompts * image * (runs + 1) / 3600:.0f} h, without pairs"
    )


def table(output: str, runs: list[str]) -> str:
    """Compares the evaluations of OUTPUT/evaluations; writes OUTPUT/table.json.

    Args:
      output: folder of launch/reproduce.sh.
      runs: names of runs, <objective>-<seed>. The seeds of an objective are pooled: a group of
        scenes (a subject, or a combination of subjects) is resampled with the values of all seeds.

    Returns:
      The table as text.
    """
    folder = OutputFolder(output)
    objectives: dict[str, list[str]] = {}
    for run in runs:
        objectives.setdefault(run.rpartition("-")[0], []).append(run)
    lines = [["", *(metric_names.title(m) for *_, metrics in SECTIONS for m in metrics)]]
    rows: dict[str, list[str]] = {name: [name] for name in ["base", *objectives, *PUBLISHED]}
    found: dict[str, Any] = {}
    heading = []
    for kind, title, metrics in SECTIONS:
        paths = [folder.path / "evaluations" / name / kind for name in ("base", *runs)]
        compared = comparison.read(paths)
        scores = dict(zip(("base", *runs), compared.tables))
        groups = len({scene.group for scene in compared.scenes})
        heading.append(f"{title}: {len(compared.scenes)} images of {groups}")
        found[kind] = {"scenes": len(compared.scenes), "groups": groups, "metrics": {}}
        for i, metric in enumerate(metrics):
            estimates = found[kind]["metrics"][metric] = {}
            for name in ("base", *objectives):
                values = [scores[run][metric] for run in objectives.get(name, ["base"])]
                estimates[name] = _estimates(scores["base"][metric], values, compared.seed)
                rows[name].append(_cell(metric, estimates[name], name != "base"))
            for name, published in PUBLISHED.items():
                known = published.get(kind, ())
                rows[name].append(f"{known[i]:.3f}" if i < len(known) else "")
    for name, own in objectives.items():
        found.setdefault("logit_scale", {})[name] = _logit_scale(folder.path / "runs", own)
    folder.write("table.json", found)
    notes = [
        "Left: " + "; then ".join(heading) + " subjects or pairs of them.",
        "In parentheses: minus base, paired; * its 95 % interval over subjects excludes 0.",
        "The published rows are of all 30 subjects, of another SDXL (docs/reproduce.md).",
        "Mean |beta / 2 margin| of training: "
        + ", ".join(
            f"{name} {scale:.2g}"
            for name, scale in found["logit_scale"].items()
            if scale is not None
        ),
    ]
    return "\n".join([tables.aligned([*lines, *rows.values()]), *notes])


def _estimates(
    base: np.ndarray, values: list[np.ndarray], seed: int
) -> dict[str, dict[str, float | None]]:
    pooled = np.concatenate(values, axis=1)
    return {
        "mean": statistics.bootstrap_mean(pooled, seed=seed)._asdict(),
        "difference": statistics.bootstrap_difference(base, pooled, seed=seed)._asdict(),
    }


def _cell(metric: str, estimates: dict[str, Any], compared: bool) -> str:
    """Formats a mean and, in parentheses, its difference from the base."""
    text = metric_names.format_value(metric, estimates["mean"]["mean"])
    difference = estimates["difference"]
    if not compared or not difference["n"]:
        return text
    star = "*" if tables.certain(difference) else ""
    return f"{text} ({metric_names.format_value(metric, difference['mean'], signed=True)}{star})"


def _logit_scale(folder: epath.Path, runs: list[str]) -> float | None:
    """Returns the mean logit scale of the logged steps of runs; None for other objectives."""
    values = [
        logged["logit_scale"]
        for run in runs
        for line in (folder / run / "metrics.jsonl").read_text().splitlines()
        if "logit_scale" in (logged := json.loads(line))
    ]
    return float(np.mean(values)) if values else None


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and runs one of the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("split", help="selects prompts and photographs")
    part.add_argument("--dreambench", required=True, help="DreamBench's dataset folder")
    part.add_argument("--lists", required=True, help="folder of UNO's lists of prompts")
    part.add_argument("--output", required=True, help="output folder")
    part.add_argument("--train_subjects", nargs="+", help="subjects to train on")
    part.add_argument("--segmented", action="store_true", help="use photographs without masks too")
    part = parts.add_parser("time", help="prints memory and time of a plan")
    part.add_argument("--plan", required=True, help="command that prints a plan as JSON")
    part.add_argument("--steps", type=int, required=True, help="optimiser steps of a training")
    part.add_argument("--runs", type=int, required=True, help="number of trainings")
    part.add_argument("--samples", type=int, required=True, help="images of each prompt")
    part = parts.add_parser("table", help="prints the table")
    part.add_argument("--output", required=True, help="folder of launch/reproduce.sh")
    part.add_argument("--runs", nargs="+", required=True, help="<objective>-<seed> of every run")
    given = parser.parse_args(argv)
    try:
        if given.part == "split":
            split(
                given.dreambench, given.lists, given.output, given.train_subjects, given.segmented
            )
        elif given.part == "time":
            time(given.plan, given.steps, given.runs, given.samples)
        else:
            print(table(given.output, given.runs))
    except UserError as error:
        command.fail(error)


if __name__ == "__main__":
    main()
