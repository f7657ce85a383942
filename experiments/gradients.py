"""Gradients of preference objectives at the reference parameters, for `gradient_gate`."""

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
    """The gradient of a setting's loss at the reference parameters, one vector per batch.

    Args:
      config: RunConfig of the setting.
      model: the model that is differentiated.
      batches: batches of encoded pairs.
      structure, params: StepStructure and BucketParams, which give the range of timesteps.
      seed: of timesteps and noise. Batch i uses the same random key in every setting.

    Returns:
      A list of float64 vectors of all trained parameters.
    """
    trainable, rest = split_parameters(model.parameters, config.trainable)
    source, _ = assembly.make_encoder(model.generator, config, assembly.focus_buckets(config))
    objective = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
    frozen = {
        "parameters": {part: tree for part, tree in rest.items() if part in objective.parts},
        "reference": trainable,
    }

    # Two programs, as in training, so that settings and buckets share that of the gradient.
    reference_pass = jax.jit(objective.reference_pass, static_argnums=0)

    @jax.jit
    def gradient(trainable, frozen, pairs, outputs, params, key):
        tree = jax.grad(lambda t: objective.loss(t, frozen, pairs, outputs, params, key)[0])(
            trainable
        )
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

    vectors = []
    for i, pairs in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        outputs, _ = reference_pass(structure, {**frozen, "policy": trainable}, pairs, params, key)
        vectors.append(
            np.asarray(gradient(trainable, frozen, pairs, outputs, params, key), np.float64)
        )
    return vectors


def compare(config: Any, settings: Any, *, pairs, seed: int, batch_size: int = 16):
    """Compares the gradients of settings.

    Args:
      config: RunConfig of a run on Toybox.
      settings: {name: {field: value}}, with "dpo" and "prior_dpo" among them.
      pairs: number of training pairs, even.
      seed: of timesteps and noise.
      batch_size: largest number of pairs in a batch. Reduced until it divides half of the pairs.

    Returns:
      {bucket: {name: {"prior_dpo", "dpo", "halves": cosines, "norm": ratio to the norm of dpo}}}.
    """
    model = models.load_model(config)
    size = next(s for s in range(min(batch_size, pairs // 2), 0, -1) if (pairs // 2) % s == 0)
    buckets, encoded, results = assembly.focus_buckets(config), {}, {}

    def batches(changed):
        """Returns the pairs encoded for a setting, cached by what the encoding depends on."""
        focus = changed.focus
        key = (
            changed.data,
            focus.features,
            focus.detail_colour,
            focus.reference_detail,
        )
        if key not in encoded:
            records = run_data.open_data(changed)["train"]
            transform = loader.pair_transform(
                tokenize=model.tokenizer,
                num_subjects=run_data.subject_slots(changed, {"train": records}),
                reference_size=model.generator.config.image_encoder.image_size,
            )
            full = dataclasses.replace(changed, objective="focus_dpo")
            _, encode = assembly.make_encoder(model.generator, full, assembly.focus_buckets(full))
            encoded[key] = [
                encode(model.parameters, batch)
                for batch in loader.evaluation_batches(
                    [records[i] for i in range(pairs)], transform=transform, batch_size=size
                )
            ]
        return encoded[key]

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
        results[bucket] = {
            name: {
                "prior_dpo": cosine(whole[name], whole["prior_dpo"]),
                "dpo": cosine(whole[name], whole["dpo"]),
                "halves": cosine(*(np.sum(half, axis=0) for half in np.array_split(parts, 2))),
                "norm": float(np.linalg.norm(whole[name]) / np.linalg.norm(whole["dpo"])),
            }
            for name, parts in vectors.items()
        }
    return results


def format_table(results):
    """Formats the result of `compare` as text, one row per bucket and setting."""
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
    for bucket, settings in results.items():
        for name, values in settings.items():
            lines.append(
                [
                    bucket,
                    name,
                    *(f"{values[key]:.3f}" for key in ("prior_dpo", "dpo", "halves", "norm")),
                ]
            )
    return aligned(lines)
