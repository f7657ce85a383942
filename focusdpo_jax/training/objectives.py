"""The losses of a generator: supervised fine-tuning and preference objectives over one step.

What the objectives share is here once: noise, the policy's and the reference model's error maps,
the weight maps. Which of them an objective needs is decided before anything is compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp

from focusdpo_jax.focus import correspondence, losses, weighting
from focusdpo_jax.focus.buckets import BucketStructure, sample_timesteps
from focusdpo_jax.models.generator import Conditioning, merge_parameters

OBJECTIVES = ("sft", "dpo", "prior_dpo", "focus_dpo")


@dataclasses.dataclass(frozen=True)
class StepStructure:
    """What one executable computes: the objective and, for `focus_dpo`, the weight's terms."""

    objective: str
    weight: BucketStructure

    def __str__(self):
        return f"{self.objective} ({self.weight})" if self.objective == "focus_dpo" else (
            self.objective)


def draw_latents(key, encoded):
    """Latents of chosen, then rejected (if encoded), with one draw for both: [P * B, h, w, C]."""
    draw = jax.random.normal(key, encoded.latents_mean[:, 0].shape)[:, None]
    return by_image(encoded.latents_mean.astype(jnp.float32)
                    + encoded.latents_deviation.astype(jnp.float32) * draw)


def by_image(x):
    """[B, P, ...] as [P * B, ...]: all chosen first, then all rejected."""
    return jnp.moveaxis(x, 1, 0).reshape(-1, *x.shape[2:])


def twice(tree):
    """Every array of a tree [B, ...] followed by itself: [2B, ...]."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)


def condition(generator, parameters, encoded):
    """The conditioning [B] of a batch: text encoders and subject adapter of `parameters`."""
    text, pooled = generator.encode_text(parameters, encoded.token_ids)
    tokens = generator.subject_tokens(
        parameters, encoded.reference_features.astype(jnp.float32))
    return Conditioning(text=text, pooled=pooled, time_ids=encoded.time_ids,
                        image_tokens=tokens, image_present=encoded.present)


def drop_conditions(generator, parameters, conditioning, empty, key, probability):
    """Takes text, references or both away from some examples, for classifier-free guidance.

    Each of the three happens with `probability`. Text is replaced by that of `empty` [1, 2, L].
    """
    draw = jax.random.uniform(key, conditioning.pooled.shape[:1])
    no_text = draw < 2 * probability
    no_references = (draw >= probability) & (draw < 3 * probability)
    text, pooled = generator.encode_text(parameters, empty)
    return conditioning.replace(
        text=jnp.where(no_text[:, None, None], text, conditioning.text),
        pooled=jnp.where(no_text[:, None], pooled, conditioning.pooled),
        image_present=conditioning.image_present & ~no_references[:, None])


def weights(structure, numbers, encoded):
    """Weight maps [2B, h, w] of chosen, then rejected, and per-image diagnostics [2B]."""
    prior = twice(encoded.prior.astype(jnp.float32))
    if structure.objective in ("sft", "dpo"):
        return weighting.uniform_weights(prior), {}
    if structure.objective == "prior_dpo":
        return weighting.prior_weights(prior, numbers.background), {}
    matched = detail = None
    if structure.weight.spaf:
        matched = match(numbers, encoded, prior.shape[1:])
    if structure.weight.dpce:
        detail = by_image(encoded.detail).astype(jnp.float32)
    return weighting.focus_weights(structure.weight, numbers, prior, matched, detail)


def match(numbers, encoded, grid):
    """SPAF's match [2B] of chosen, then rejected, with the references, on the latent grid."""
    present, masks = encoded.present, encoded.reference_masks.astype(jnp.float32)
    present = present & (masks.sum(-1) > 0)
    prototypes = correspondence.prototypes(
        encoded.reference_features[:, :, 1:].astype(jnp.float32), masks, present)
    targets = by_image(encoded.target_features).astype(jnp.float32)
    similarity = correspondence.cosine_similarity(twice(prototypes), targets)
    matched = correspondence.match(similarity, twice(present), twice(encoded.area), numbers.rho)
    return correspondence.to_grid(matched, grid)


def make_loss(generator, config, empty_token_ids):
    """The loss of `config.objective`, in the form that `training.step` takes.

    `frozen` holds `parameters` (what is not trained) and, for the preference objectives,
    `reference` (the trainable parameters as they were at the start). `empty_token_ids` [2, L] is
    the prompt that stands for a dropped caption.
    """
    empty = jnp.asarray(empty_token_ids)[None]

    def policy_error(trainable, frozen, encoded, noisy, timesteps, target, key):
        parameters = merge_parameters(trainable, frozen["parameters"])
        conditioning = condition(generator, parameters, encoded)
        if config.condition_dropout:
            conditioning = drop_conditions(
                generator, parameters, conditioning, empty, key, config.condition_dropout)
        if len(noisy) > len(conditioning.pooled):
            conditioning = twice(conditioning)
        prediction, _ = generator.denoise(parameters, noisy, timesteps, conditioning)
        return losses.error_map(target, prediction)

    def denoising(structure, trainable, frozen, encoded, numbers, key):
        keys = jax.random.split(key, 4)
        batch = len(encoded.prior)
        latents = draw_latents(keys[0], encoded)
        timesteps = sample_timesteps(keys[1], numbers, batch)
        noise = jax.random.normal(keys[2], latents.shape)
        error = policy_error(
            trainable, frozen, encoded, generator.schedule.add_noise(latents, noise, timesteps),
            timesteps, generator.schedule.target(latents, noise, timesteps), keys[3])
        loss, diagnostics = losses.sft(error, weights(structure, numbers, encoded)[0][:batch])
        return loss.mean(), jax.tree.map(jnp.mean, diagnostics)

    def preference(structure, trainable, frozen, encoded, numbers, key):
        keys = jax.random.split(key, 4)
        batch = len(encoded.prior)
        latents = draw_latents(keys[0], encoded)
        timesteps = twice(sample_timesteps(keys[1], numbers, batch))
        noise = twice(jax.random.normal(keys[2], latents[:batch].shape))
        noisy = generator.schedule.add_noise(latents, noise, timesteps)
        target = generator.schedule.target(latents, noise, timesteps)
        policy = policy_error(trainable, frozen, encoded, noisy, timesteps, target, keys[3])
        reference = jax.lax.stop_gradient(policy_error(
            frozen["reference"], frozen, encoded, noisy, timesteps, target, keys[3]))
        weight, weight_diagnostics = weights(structure, numbers, encoded)
        loss, diagnostics = losses.diffusion_dpo(
            policy[:batch], reference[:batch], policy[batch:], reference[batch:],
            weight[:batch], weight[batch:], config.beta)
        return loss.mean(), jax.tree.map(jnp.mean, diagnostics | weight_diagnostics)

    return denoising if config.objective == "sft" else preference
