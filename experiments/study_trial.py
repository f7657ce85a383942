"""One trial of `toybox_study.py`: trains a model and measures its images at given steps.

    python -m experiments.study_trial FOLDER

`FOLDER/trial.json` describes the trial. Each measurement is written to `<split>_<step>.npz` in the
folder: Toybox's measures for each scene, and the first images. Existing measurements are skipped.
Training to a later step resumes the run. With a constant learning rate, all steps belong to one
training.
"""

import argparse
import dataclasses
import io
import json
import pathlib
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax import config as config_lib
from focusdpo_jax import config_files
from focusdpo_jax.data import loader
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.inference.generate import generate_all, make_generate
from focusdpo_jax.toybox import metrics as toybox_metrics
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read
from focusdpo_jax.training import encoding, loop, models, run_data, runs

SAVED_IMAGES = 8  # Images in the file of a measurement.


def load_config(path, overrides):
    """Loads the configuration of a file and replaces some of its fields."""
    config = config_lib.parse(config_files.load(path))
    try:
        config = config_lib.replace(config, overrides)
    except KeyError as error:
        raise UserError(f"config.{error.args[0]} is not a field") from error
    config_lib.check(config)
    return config


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, and --set for fields that all trials share."""

    def assignment(text):
        name, _, value = text.partition("=")
        return name, json.loads(value)

    parser.add_argument(
        "--config", default="configs/toybox_dpo.py", help="configuration of all trials"
    )
    parser.add_argument(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="override a field in all trials, such as batch_size=64",
    )


def scenes_of(config: Any, split: str, count: int):
    """The measured scenes, of two and three subjects that do not occur in training.

    Returns:
      A function from a model to a list of PreferenceBatches of numpy arrays, with `count` scenes of
      `split` in total.
    """
    config = config_lib.replace(
        config,
        {
            "data.subject_counts": (0.0, 0.5, 0.5),
            "data.train_size": 1,
            "data.validation_size": count,
            "data.test_size": count,
        },
    )
    source = run_data.open_data(config)[split]

    def batches(model):
        transform = loader.pair_transform(
            tokenize=model.tokenizer,
            num_subjects=3,
            reference_size=model.generator.config.image_encoder.image_size,
        )
        return list(
            loader.evaluation_batches(
                [source[i] for i in range(count)],
                transform=transform,
                batch_size=min(count, config.evaluation.batch_size),
            )
        )

    return batches


def measure(model: Any, config: Any, batches):
    """Generates and measures images of scenes.

    Returns:
      Toybox's measures {name: [scenes, ...]}, the images uint8 [scenes, H, W, 3], and the scenes as
      one PreferenceBatch.
    """
    generator, parameters = model.generator, jax.device_put(model.parameters)
    # Sampling needs the encoded references and captions only, as the objective sft does.
    supervised = dataclasses.replace(config, objective="sft")
    encoded = encoding.cached(
        encoding.encoder(generator, supervised),
        parameters,
        batches,
        sum(int((batch.index >= 0).sum()) for batch in batches),
    ).encoded
    generate = make_generate(
        generator,
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        negative_token_ids=model.tokenizer(""),
    )
    # All trials generate a scene from the same noise.
    images = generate_all(
        generate,
        parameters,
        encoded,
        seed=0,
        batch_size=len(batches[0].index),
        latent_shape=generator.latent_shape(config.resolution),
        place=jax.device_put,
    )
    probe = jax.jit(lambda p, x: read(cast(Any, Probe(TOYBOX).apply({"params": p}, x))))
    size = len(batches[0].index)
    readings = [
        probe(model.probe, jnp.asarray(images[i : i + size]) / 255)
        for i in range(0, len(images), size)
    ]
    readings = jax.tree.map(lambda *rows: np.concatenate(rows), *readings)
    raw = jax.tree.map(lambda *rows: np.concatenate(rows)[: len(images)], *batches)
    return toybox_metrics.compute(readings, raw.truth, raw.present), images, raw


def save(path: pathlib.Path, arrays) -> None:
    """Writes an npz file atomically."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_file(path, content.getvalue())


def run(folder: str | pathlib.Path) -> None:
    """Runs the trial in `folder/trial.json`."""
    folder = pathlib.Path(folder)
    trial = json.loads((folder / "trial.json").read_text())
    config = load_config(trial["config"], trial["overrides"])
    batches_for = scenes_of(config, trial["split"], trial["scenes"])
    for step in trial["steps"]:
        path = folder / f"{trial['split']}_{step:06d}.npz"
        if path.exists():
            continue
        if step:
            config = dataclasses.replace(config, steps=step)
            try:
                loop.run(config, folder / "run")
            except UserError as error:
                if "config.learning_rate" not in str(error):
                    raise
                # A loss that is not finite is a valid outcome: the settings are unstable.
                (folder / "gave_up.txt").write_text(f"{error}\n")
                return
            model = runs.Run(folder / "run").policy()
        else:
            model = models.load_model(config)
        if model.probe is None:
            raise UserError(
                f"config.model.pretrained = {config.model.pretrained!r}: this model "
                "has no probe, which the measures need"
            )
        batches = batches_for(model)
        measures, images, raw = measure(model, config, batches)
        save(
            path,
            {
                **measures,
                "pictures": images[:SAVED_IMAGES],
                "chosen": raw.chosen[:SAVED_IMAGES],
                "references": raw.references[:SAVED_IMAGES],
                "present": raw.present[:SAVED_IMAGES],
            },
        )
        logging.info("%s", path)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        run(sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
