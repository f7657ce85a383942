"""The teacher-forced measure: how training changed the errors of held-out pairs, by region.

The errors of policy and base are compared on the same pairs, timesteps and noise, without sampling
and without a probe. For each pair and region,

    gain   = (d_policy - d_base)(rejected) - (d_policy - d_base)(chosen)
    winner = (d_policy - d_base)(chosen)

with the mean of d over the region, both in percent of the base's mean error of chosen images in the
region at the timestep. A good method has a large gain where an attribute was changed, and a winner
that does not rise. The regions are `changed` (pixels that a changed attribute affects, which Toybox
knows), `subject` (the rest of the subjects and of the prior mask) and `background`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from focusdpo_jax import config as config_lib
from focusdpo_jax.data import loader
from focusdpo_jax.focus import losses
from focusdpo_jax.focus.buckets import make_buckets
from focusdpo_jax.focus.grids import average_to_grid
from focusdpo_jax.training import encoding, generator_step, run_data

REGIONS = ("changed", "subject", "background")
TIMESTEPS = (875, 625, 375, 125)


class HeldOut(NamedTuple):
    """Encoded pairs that no training has seen.

    Attributes:
      batches: list of EncodedPairs of one size.
      regions: [N, regions, h, w], share of each latent location that belongs to each region.
    """

    batches: list[Any]
    regions: Float[np.ndarray, "pairs regions height width"]


def open_pairs(config: Any, model: Any, *, split: str, count: int, batch_size: int = 32) -> HeldOut:
    """Encodes the first `count` pairs of a split of Toybox; count is rounded to whole batches."""
    sizes = {"data.validation_size": count, "data.test_size": count, "data.train_size": 1}
    config = config_lib.replace(config, {**sizes, "objective": "dpo", "data.oracle_mask": False})
    truth = config_lib.replace(config, {"data.oracle_mask": True})
    transform = loader.pair_transform(
        tokenize=model.tokenizer,
        num_subjects=run_data.subject_slots(config, run_data.open_data(config)),
        reference_size=model.generator.config.image_encoder.image_size,
    )
    batches, oracle = (
        list(
            loader.evaluation_batches(
                [source[i] for i in range(count - count % batch_size)],
                transform=transform,
                batch_size=batch_size,
            )
        )
        for source in (run_data.open_data(c)[split] for c in (config, truth))
    )
    encode = encoding.encoder(model.generator, config)
    parameters = jax.device_put(model.parameters)
    encoded = [encode(parameters, batch) for batch in batches]
    regions = []
    for batch, known, pairs in zip(batches, oracle, encoded, strict=True):
        subject = batch.masks.any(1) | batch.prior_mask
        grid = pairs.prior.shape[1:]
        changed, subject = (
            np.asarray(average_to_grid(mask.astype(jnp.float32), grid))
            for mask in (known.prior_mask, subject | known.prior_mask)
        )
        regions.append(np.stack([changed, subject - changed, 1 - subject], axis=1))
    return HeldOut(encoded, np.concatenate(regions))


def error_maps(
    config: Any, model: Any, parameters: Any, held_out: HeldOut, seed: int = 0
) -> Float[np.ndarray, "pairs timesteps images height width"]:
    """Computes the error maps of chosen and rejected images at `TIMESTEPS`.

    The noise of a pair depends only on `seed`, the batch and the timestep, so that all models get
    the same.
    """
    config = dataclasses.replace(config, objective="dpo", condition_dropout=(0.0, 0.0, 0.0))
    generator = model.generator
    step = generator_step.GeneratorStep(generator, config, model.tokenizer(""))
    limits = make_buckets(1)[0].params

    @functools.partial(jax.jit, static_argnums=3)
    def compute(parameters, pairs, key, timestep):
        params = limits._replace(t_low=timestep, t_high=timestep + 1)
        noisy = step.noisy(pairs, params, key)
        conditioning = generator_step.condition(generator, parameters, pairs)
        prediction, _ = generator.denoise(parameters, noisy.latents, noisy.timesteps, conditioning)
        maps = losses.error_map(noisy.target, prediction)
        return maps.reshape(-1, 2, *maps.shape[1:])

    parameters, maps = jax.device_put(parameters), []
    for i, pairs in enumerate(held_out.batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        maps.append(np.stack([compute(parameters, pairs, key, t) for t in TIMESTEPS], axis=1))
    return np.concatenate(maps)


def changes(
    policy: Float[np.ndarray, "pairs timesteps images height width"],
    base: Float[np.ndarray, "pairs timesteps images height width"],
    regions: Float[np.ndarray, "pairs regions height width"],
) -> dict[str, Float[np.ndarray, "pairs timesteps regions"]]:
    """Computes `gain` and `winner` of the module in percent; NaN where a pair lacks a region."""

    def means(maps):
        area = regions.sum((2, 3))
        total = np.einsum("ntihw,nrhw->intr", maps, regions)
        return total / np.where(area > 0, area, np.nan)[None, :, None]

    before = means(base)
    change = means(policy) - before
    unit = np.nanmean(before[0], axis=0) / 100
    return {"gain": (change[1] - change[0]) / unit, "winner": change[0] / unit}
