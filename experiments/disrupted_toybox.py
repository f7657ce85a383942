r"""Measures `disrupt` on Toybox, where attributes are known, and FocusDPO trained on its pairs.

    python -m experiments.disrupted_toybox pictures --split=validation --scenes=32 -- --strength=0.8
    python -m experiments.disrupted_toybox pictures --split=test --scenes=96
    python -m experiments.disrupted_toybox training --scenes=128 --measured=896

`pictures` disrupts scenes of a split with the shipped base and applies the probe to the result, for
each subject and only inside its mask: is the class preserved, and is it a different individual?

`training` disrupts scenes of the training split, prepares the pairs, trains FocusDPO on them as in
configs/toybox_dpo.py, and measures base and policy on Toybox's test scenes.

Arguments after `--` are passed to `disrupt`; different ones need a different --output. Every step
resumes after an interruption.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax import toybox
from focusdpo_jax.data.images import decode_image, decode_mask, encode_png
from focusdpo_jax.evaluation import statistics
from focusdpo_jax.files import replace_file
from focusdpo_jax.toybox import metrics as toybox_metrics
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read
from focusdpo_jax.training import runs

CONFIG = "configs/toybox_dpo.py"


def write_scenes(folder: pathlib.Path, split: str, count: int):
    """Writes Toybox scenes as a manifest for `disrupt` and returns its path."""
    world, lines = toybox.World(), []
    for index in range(count):
        record = world.record(split, index)

        def write_png(name, pixels, index=index):
            replace_file(folder / f"{index:04d}_{name}.png", encode_png(pixels))
            return f"{index:04d}_{name}.png"

        lines.append(
            {
                "caption": record["caption"],
                "chosen": write_png("chosen", record["chosen"]),
                "subjects": [
                    {
                        "phrase": s["phrase"],
                        **{
                            name: write_png(f"{name}{i}", s[name])
                            for name in ("reference", "reference_mask", "mask")
                        },
                    }
                    for i, s in enumerate(record["subjects"])
                ],
            }
        )
    manifest = folder / "scenes.jsonl"
    replace_file(manifest, "".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def call(command: Any, *flags) -> None:
    """Runs a command of the package, such as "prepare"."""
    subprocess.run([sys.executable, "-m", f"focusdpo_jax.{command}", *flags], check=True)


class Reader:
    """The probe's reading of one subject in an image."""

    def __init__(self) -> None:
        self._parameters = jax.device_put(runs.load_folder("toybox").probe)
        self._read_subject = jax.jit(self._read_inside)

    @staticmethod
    def _read_inside(parameters, image, mask):
        maps: Any = Probe(TOYBOX).apply({"params": parameters}, image[None] / 255.0)
        grid = maps.class_logits.shape[1]
        inside = mask.reshape(grid, len(mask) // grid, grid, -1).any((1, 3))
        background_logits = jnp.where(
            jnp.arange(maps.class_logits.shape[-1]) < TOYBOX.classes, -1e9, 0.0
        )
        return read(
            maps.replace(
                class_logits=jnp.where(
                    inside[None, :, :, None], maps.class_logits, background_logits
                )
            )
        )

    def __call__(self, image, mask, subject):
        """Returns (the subject's class is found inside the mask, it is a different individual)."""
        reading = jax.tree.map(
            lambda x: np.asarray(x)[0], self._read_subject(self._parameters, image, mask)
        )
        own = toybox.Subject(**{name: subject[name] for name in toybox.ATTRIBUTES})
        of_class = {name: getattr(reading, name)[own.class_id].item() for name in toybox.LOOKS}
        if toybox.PATTERNS[of_class["pattern"]] == "plain":
            of_class["pattern_hue"] = of_class["hue"]
        kept = reading.area[own.class_id] >= toybox_metrics.MIN_AREA
        return bool(kept), toybox.visibly_different(own, toybox.Subject(own.class_id, **of_class))


def measure(folder: pathlib.Path, split: str) -> None:
    """Prints the shares of kept classes and of changed looks for the pairs in a folder."""
    reader, world, outside = Reader(), toybox.World(), 0
    kinds = ("disrupted", "original")
    kept, changed = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    for index, text in enumerate((folder / "manifest.jsonl").read_text().splitlines()):
        pair, record = json.loads(text), world.record(split, index)
        chosen, rejected = (
            decode_image((folder / pair[name]).read_bytes())[0] for name in ("chosen", "rejected")
        )
        assert np.array_equal(chosen, record["chosen"])
        masks = [decode_mask((folder / s["mask"]).read_bytes()) for s in pair["subjects"]]
        outside += int((chosen != rejected)[~np.any(masks, axis=0)].sum())
        for kind, image in zip(kinds, (rejected, chosen), strict=True):
            readings = [
                reader(image, mask, subject)
                for mask, subject in zip(masks, record["subjects"], strict=True)
            ]
            kept[kind].append([float(present) for present, _ in readings])
            changed[kind].append(
                [float(different) if present else np.nan for present, different in readings]
            )
    scenes, subjects = len(kept["original"]), sum(map(len, kept["original"]))
    print(
        f"{scenes} {split} scenes, {subjects} subjects; values outside the masks that differ: "
        f"{outside}"
    )
    for kind in kinds:
        for name, values in (("class kept", kept), ("look changed, of kept", changed)):
            rows = np.full((scenes, 3), np.nan)
            for row, value in zip(rows, values[kind]):
                row[: len(value)] = value
            share = statistics.bootstrap_mean(rows, seed=0)
            print(f"  {kind:9} {name:22} {share.mean:6.1%} [{share.low:.1%}, {share.high:.1%}]")


def train(folder: pathlib.Path, measured, steps: int) -> None:
    """Prepares the pairs, trains on them, and measures base and policy on Toybox's test scenes."""
    call(
        "prepare",
        f"--manifest={folder}/pairs/manifest.jsonl",
        f"--output={folder}/data",
        "--resolution=64",
        "--validation=0.05",
        "--test=0",
        "--workers=1",
    )
    call(
        "main",
        f"--config={CONFIG}",
        f"--workdir={folder}/run",
        "--config.data.source=prepared",
        f"--config.data.path={folder}/data",
        f"--config.steps={steps}",
        "--config.evaluation.scenes=0",
    )
    call(
        "evaluate",
        f"--config={CONFIG}",
        f"--workdir={folder}/run",
        f"--output={folder}/evaluation",
        f"--config.evaluation.scenes={measured}",
    )


def main() -> None:
    """Disrupts scenes, then measures the pairs or trains on them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["pictures", "training"])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/disrupted"))
    parser.add_argument(
        "--split",
        choices=toybox.SPLITS,
        default="validation",
        help="split for `pictures`; `training` uses the training split",
    )
    parser.add_argument("--scenes", type=int, default=32, help="scenes to disrupt")
    parser.add_argument("--steps", type=int, default=80, help="training steps")
    parser.add_argument("--measured", type=int, default=896, help="test scenes after training")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    split = "train" if options.part == "training" else options.split
    folder = options.output / options.part / split
    manifest = write_scenes(folder / "scenes", split, options.scenes)
    call("disrupt", f"--manifest={manifest}", f"--output={folder}/pairs", *flags)
    if options.part == "pictures":
        measure(folder / "pairs", split)
    else:
        train(folder, options.measured, options.steps)


if __name__ == "__main__":
    main()
