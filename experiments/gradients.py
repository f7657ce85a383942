"""Gradients of preference objectives at the reference parameters; see `gradient_gate`, the command."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax import config as config_lib
from focusdpo_jax.data import loader
from focusdpo_jax.evaluation.tables import aligned
from focusdpo_jax.models.generator import split_parameters
from focusdpo_jax.training import assembly, generator_step, models, run_data


def cosine(first, second):
    """Cosine of two vectors."""
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def gradients(config: Any, model: Any, batches, structure, params, seed: int):
    """The gradient of a setting's loss at the reference parameters, one vector a batch.

    Args:
      config: of the setting.
      batches: encoded pairs.
      structure, params: StepStructure and BucketParams, whose timesteps are drawn.
      seed: of timesteps and noise; batch i draws from its i-th key whatever the setting.
    """
    trainable, rest = split_parameters(model.parameters, config.trainable)
    source, _ = assembly.make_encoder(model.generator, config, assembly.focus_buckets(config))
    objective = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
    frozen = {
        "parameters": {part: tree for part, tree in rest.items() if part in objective.parts},
        "reference": trainable,
    }

    @jax.jit
    def gradient(trainable, frozen, pairs, key):
        outputs, _ = objective.reference_pass(structure, frozen, pairs, params, key)
        tree = jax.grad(lambda t: objective.loss(t, frozen, pairs, outputs, params, key)[0])(
            trainable
        )
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

    return [
        np.asarray(
            gradient(trainable, frozen, pairs, jax.random.fold_in(jax.random.key(seed), i)),
            np.float64,
        )
        for i, pairs in enumerate(batches)
    ]


def compare(config: Any, settings: Any, *, pairs, seed: int, batch_size: int = 16):
    """Compares the gradients of settings.

    Args:
      config: RunConfig of a run on Toybox.
      settings: {name: {field: value}}, with "dpo" and "prior_dpo" among them.
      pairs: training pairs that are measured, an even number.
      seed: of timesteps and noise.
      batch_size: pairs at once; a half is filled with whole batches.

    Returns:
      {bucket: {name: {"prior_dpo", "dpo", "halves": cosines, "norm": over dpo's}}}.
    """
    model = models.load_model(config)
    records = run_data.open_data(config)["train"]
    transform = loader.pair_transform(
        tokenize=model.tokenizer,
        num_subjects=run_data.subject_slots(config, {"train": records}),
        reference_size=model.generator.config.image_encoder.image_size,
    )
    size = next(s for s in range(min(batch_size, pairs // 2), 0, -1) if (pairs // 2) % s == 0)
    raw = list(
        loader.evaluation_batches(
            [records[i] for i in range(pairs)], transform=transform, batch_size=size
        )
    )
    buckets, encoded, found = assembly.focus_buckets(config), {}, {}

    def batches(changed):
        """The pairs, encoded for the setting's source of similarity."""
        features = changed.focus.features
        if features not in encoded:
            full = dataclasses.replace(changed, objective="focus_dpo")
            _, encode = assembly.make_encoder(model.generator, full, assembly.focus_buckets(full))
            encoded[features] = [encode(model.parameters, batch) for batch in raw]
        return encoded[features]

    for bucket, (_, limits) in buckets.items():
        vectors = {}
        for name, fields in settings.items():
            changed = config_lib.replace(config, {"anchor": 0.0, **fields})
            own = assembly.focus_buckets(changed)
            structure, params = own.get(bucket) or next(iter(own.values()))
            params = params._replace(index=limits.index, t_low=limits.t_low, t_high=limits.t_high)
            vectors[name] = gradients(changed, model, batches(changed), structure, params, seed)
            logging.info("%s: %s", bucket, name)
        whole = {name: np.sum(parts, axis=0) for name, parts in vectors.items()}
        found[bucket] = {
            name: {
                "prior_dpo": cosine(whole[name], whole["prior_dpo"]),
                "dpo": cosine(whole[name], whole["dpo"]),
                "halves": cosine(*(np.sum(half, axis=0) for half in np.array_split(parts, 2))),
                "norm": float(np.linalg.norm(whole[name]) / np.linalg.norm(whole["dpo"])),
            }
            for name, parts in vectors.items()
        }
    return found


def format_table(found):
    """The result of `compare` as text: a row for each bucket and setting."""
    lines = [
        [
            "timesteps",
            "setting",
            "cosine with prior_dpo",
            "with dpo",
            "of halves",
            "norm over dpo's",
        ]
    ]
    for bucket, settings in found.items():
        for name, figures in settings.items():
            lines.append(
                [
                    bucket,
                    name,
                    *(f"{figures[key]:.3f}" for key in ("prior_dpo", "dpo", "halves", "norm")),
                ]
            )
    return aligned(lines)
