"""Losses that train Toybox's autoencoder, image encoder and probe.

`autoencoder_loss` trains the autoencoder on scenes and references. `image_encoder_loss` trains the
image encoder to predict attributes from its patch features. `probe_loss` trains the probe that
evaluation uses, and `generated_probe_loss` adapts it to images of the trained generator. Published
models include such encoders; Toybox's are trained here (`configs/toybox_base.py`).

Each builder returns `loss(trainable, frozen, batch, outputs, params, key) -> (loss, terms)`, the
signature of all training losses. These losses ignore the outputs of the reference pass and the
bucket's parameters (`params`).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from focusdpo_jax.diffusion import samplers
from focusdpo_jax.models.conditioned_denoiser import conditioned_denoiser
from focusdpo_jax.models.generator import Generator
from focusdpo_jax.toybox.probe import TOYBOX, AttributeHeads, AttributeMaps, Probe, attribute_loss

if TYPE_CHECKING:
    from focusdpo_jax.data.record import PreferenceBatch

# Weight of the KL divergence from a unit normal, small as in latent diffusion (arXiv 2112.10752).
_DIVERGENCE_WEIGHT = 1e-6

Loss = Callable[..., tuple[Array, dict[str, Array]]]
"""(trainable, frozen, batch, outputs, params, key) -> (scalar loss, {name: scalar term})."""


def first_reference(batch: "PreferenceBatch") -> Array | np.ndarray:
    """Returns each record's first reference, which always exists: [B, R, R, 3]."""
    return batch.references[:, 0]


def pixels(images: Array | np.ndarray) -> Float[Array, "..."]:
    """Converts uint8 images to float32 in [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 255


def crops_around(
    images: Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"],
    masks: Bool[Array, "B H W"],
    key: PRNGKeyArray,
    size: int,
) -> Array:
    """Crops squares near the regions that masks mark.

    Args:
      images: [B, H, W, 3].
      masks: bool [B, H, W].
      key: key of the random offset, whose standard deviation is size / 8 pixels.
      size: side of the crops.

    Returns:
      [B, size, size, 3]: crops centred on the mask's centroid plus the offset, inside the image.
    """
    marked = masks.astype(jnp.float32)
    total = jnp.maximum(marked.sum((1, 2)), 1.0)
    limits = np.array(images.shape[1:3])
    middle = jnp.stack(
        [
            jnp.einsum("bhw,h->b", marked, jnp.arange(limits[0], dtype=jnp.float32)) / total,
            jnp.einsum("bhw,w->b", marked, jnp.arange(limits[1], dtype=jnp.float32)) / total,
        ],
        -1,
    )
    middle = middle + size / 8 * jax.random.normal(key, middle.shape)
    offsets = jnp.clip(jnp.round(middle - size / 2), 0, limits - size).astype(jnp.int32)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, 3))

    return jax.vmap(crop)(images, offsets)


def _reconstruction(
    generator: Generator, parameters: Any, images: Float[Array, "B H W 3"], key: PRNGKeyArray
) -> tuple[Array, dict[str, Array]]:
    """Returns loss and terms of autoencoding `images` [B, H, W, 3] in [0, 1]."""
    mean, deviation = generator.encode_latents(parameters, images)
    decoded = generator.decode_latents(
        parameters, mean + deviation * jax.random.normal(key, mean.shape)
    )
    # The absolute error favours sharp edges, the squared error accurate colours.
    absolute, squared = jnp.abs(decoded - images).mean(), jnp.square(decoded - images).mean()
    scale = generator.config.vae.scaling_factor
    mean, deviation = mean / scale, deviation / scale
    divergence = (
        0.5
        * (jnp.square(mean) + jnp.square(deviation) - 1 - 2 * jnp.log(deviation))
        .sum((1, 2, 3))
        .mean()
    )
    total = absolute + 2 * squared + _DIVERGENCE_WEIGHT * divergence
    return total, {
        "absolute_error": absolute,
        "divergence": divergence,
        "psnr": -10 * jnp.log10(squared),
    }


def autoencoder_loss(generator: Generator) -> Loss:
    """Returns the loss of a variational autoencoder on crops around subjects and whole scenes.

    Subjects are the difficult part of the images: crops around them, in scenes and references, are
    as informative as whole images at a fraction of the cost. Whole images keep the statistics of
    the group normalisations correct.
    """

    def loss(trainable, frozen, batch, outputs, params, key):
        del frozen, outputs, params
        keys = jax.random.split(key, 5)
        count, slots, size = *batch.present.shape, batch.chosen.shape[1] // 2
        slot = jax.random.randint(keys[0], (count,), 0, slots) % batch.present.sum(1)
        row = jnp.arange(count)
        images = jnp.concatenate(
            [
                crops_around(batch.chosen, batch.masks[row, slot], keys[1], size),
                crops_around(
                    batch.references[row, slot], batch.reference_masks[row, slot], keys[2], size
                ),
            ]
        )
        whole = batch.chosen[: count // 4]
        losses = [
            _reconstruction(generator, trainable, pixels(x), k)
            for x, k in ((images, keys[3]), (whole, keys[4]))
        ]
        (total, terms), (whole_total, whole_terms) = losses
        return total + whole_total, terms | {"whole_psnr": whole_terms["psnr"]}

    return loss


def with_latent_scale(model: Any, parameters: Any, images: np.ndarray) -> Any:
    """Sets VAEConfig.scaling_factor so that the latents of `images` have unit variance.

    Args:
      model: a `training.models.Model`.
      parameters: parameters of the trained autoencoder.
      images: uint8 [N, H, W, 3].

    Returns:
      The model with the new configuration.
    """
    generator = model.generator
    mean, deviation = jax.jit(generator.encode_latents)(parameters, pixels(images))
    scale = generator.config.vae.scaling_factor
    spread = float(jnp.sqrt(jnp.var(mean) + jnp.square(deviation).mean()) / scale)
    logging.info("standard deviation of the latents: %.4f", spread)
    vae = dataclasses.replace(generator.config.vae, scaling_factor=round(1 / spread, 5))
    config = dataclasses.replace(generator.config, vae=vae)
    return dataclasses.replace(model, generator=Generator(config))


def image_encoder_loss(generator: Generator) -> Loss:
    """Returns the loss of predicting attributes from the image encoder's patch features.

    Scenes and references are both used. The last layer learns the classes and the background of the
    whole image, so that the pooled embedding has the role of CLIP's.
    """
    heads, side = AttributeHeads(TOYBOX), generator.patch_grid

    def loss(trainable, frozen, batch, outputs, params, key):
        del frozen, outputs, params, key

        def encode(images):
            return generator.encode_image(trainable, pixels(images))

        def read(output) -> AttributeMaps:
            patches = output.penultimate[:, 1:]
            grid = patches.reshape(-1, side, side, patches.shape[-1])
            return cast(Any, heads.apply({"params": trainable["heads"]}, grid))

        truth = batch.truth
        scenes, alone = encode(batch.chosen), encode(first_reference(batch))
        scene_loss, terms = attribute_loss(
            read(scenes), truth, batch.masks, batch.present, truth["background"]
        )
        # A reference shows one subject on white, which is not one of the backgrounds.
        first = {name: values[:, :1] for name, values in truth.items() if name != "background"}
        alone_loss, alone_terms = attribute_loss(
            read(alone),
            first,
            batch.reference_masks[:, :1],
            batch.present[:, :1],
            truth["background"],
        )
        alone_loss = alone_loss - alone_terms["background"]
        shown = jax.nn.one_hot(truth["class_id"], TOYBOX.classes) * batch.present[..., None]
        # Two subjects may have the same class.
        named = jnp.concatenate(
            [shown.max(1), jax.nn.one_hot(truth["background"], TOYBOX.backgrounds)], axis=-1
        )
        logits = scenes.projected @ trainable["heads"]["names"]
        naming = jnp.mean(
            jnp.maximum(logits, 0) - logits * named + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        )
        terms = {f"scene_{k}": v for k, v in terms.items()} | {
            f"reference_{k}": v for k, v in alone_terms.items() if k != "background"
        }
        return scene_loss + alone_loss + naming, terms | {"naming": naming}

    return loss


def init_heads(generator: Generator, key: PRNGKeyArray) -> dict[str, Any]:
    """Returns initial parameters of the prediction heads, which are discarded after training."""
    config = generator.config.image_encoder
    side = generator.patch_grid
    assert config.projection_dim is not None  # The loss reads projected outputs.
    variables = AttributeHeads(TOYBOX).init(key, jnp.zeros((1, side, side, config.hidden_size)))
    names = TOYBOX.classes + TOYBOX.backgrounds
    kernel = 0.02 * jax.random.normal(key, (config.projection_dim, names))
    return dict(variables["params"], names=kernel)


def probe_loss(generator: Generator) -> Loss:
    """Returns the probe's loss on scenes, half autoencoded with noise and half with pixel noise.

    Generated images have artefacts of the autoencoder and small errors of the sampler. A probe
    trained on clean renders alone would misread these as attributes. `generated_probe_loss` adds
    outlines of the generator, once it is trained.
    """

    def loss(trainable, frozen, batch, outputs, params, key):
        del outputs, params
        return _attribute_loss(trainable, batch, _noisy_scenes(generator, frozen, batch, key))

    return loss


def generated_probe_loss(generator: Generator, negative_token_ids: Int[Any, "2 L"]) -> Loss:
    """Returns the probe's loss on scenes as in `probe_loss`, and on half of them regenerated.

    The generator changes outlines and patterns in ways that no render shows. `regenerate` makes
    such images, with known ground truth. Both kinds of images have the same weight.

    Args:
      generator: the generator, with trained parameters in `frozen`.
      negative_token_ids: int [2, L], the empty prompt, for guidance.
    """

    def loss(trainable, frozen, batch, outputs, params, key):
        del outputs, params
        noise_key, key = jax.random.split(key)
        half = jax.tree.map(lambda x: x[: (len(x) + 1) // 2], batch)  # Not empty.
        loss, terms = _attribute_loss(
            trainable, batch, _noisy_scenes(generator, frozen, batch, noise_key)
        )
        generated = regenerate(generator, frozen, half, negative_token_ids, key)
        generated_loss, generated_terms = _attribute_loss(trainable, half, generated)
        terms |= {f"generated_{name}": value for name, value in generated_terms.items()}
        return (loss + generated_loss) / 2, terms

    return loss


REGENERATED_TIMESTEPS = (400, 750)
"""Range of the timesteps from which `regenerate` starts, of 1000, [ours].

Up to 500 a probe trained on renders reads the result almost without errors. Up to 750 most subjects
keep place and class; their outlines and patterns are the generator's."""

_REGENERATION_GUIDANCE = (1.0, 5.0)
_REGENERATION_STEPS = 4


def regenerate(
    generator: Generator,
    parameters: Any,
    batch: "PreferenceBatch",
    negative_token_ids: Int[Any, "2 L"],
    key: PRNGKeyArray,
) -> Float[Array, "B H W 3"]:
    """Adds noise to the chosen images up to a random timestep, and removes it with the generator.

    Source: SDEdit, arXiv 2108.01073, with four DDIM steps. Captions and references are those of
    the scene. Timestep (`REGENERATED_TIMESTEPS`) and guidance scale (1 to 5) are uniformly random
    for each image.

    Args:
      generator: the generator.
      parameters: its parameters, all parts.
      batch: B scenes with references.
      negative_token_ids: int [2, L], the empty prompt, for guidance.
      key: key of timesteps, guidance scales and noise.

    Returns:
      Images [B, H, W, 3] in [0, 1].
    """
    keys = jax.random.split(key, 3)
    count, schedule = len(batch.chosen), generator.schedule
    start = jax.random.randint(keys[0], (count,), *REGENERATED_TIMESTEPS)
    low, high = _REGENERATION_GUIDANCE
    scale = jax.random.uniform(keys[1], (count, 1, 1, 1), minval=low, maxval=high)
    denoise = samplers.classifier_free_guidance(
        conditioned_denoiser(
            generator,
            parameters,
            batch.token_ids,
            batch.time_ids,
            generator.encode_reference(parameters, pixels(batch.references)),
            batch.present,
            negative_token_ids=negative_token_ids,
        ),
        scale,
    )
    clean, _ = generator.encode_latents(parameters, pixels(batch.chosen))
    noise = jax.random.normal(keys[2], clean.shape)

    def step(latents, remaining):
        timesteps = start * remaining // _REGENERATION_STEPS
        following = start * (remaining - 1) // _REGENERATION_STEPS
        prediction = denoise(latents, timesteps)
        x0 = schedule.to_x0(prediction, latents, timesteps)
        epsilon = schedule.to_epsilon(prediction, latents, timesteps)
        return jnp.where(remaining > 1, schedule.add_noise(x0, epsilon, following), x0), None

    latents, _ = jax.lax.scan(
        step,
        schedule.add_noise(clean, noise, start),
        jnp.arange(_REGENERATION_STEPS, 0, -1),
    )
    return jnp.clip(generator.decode_latents(parameters, latents), 0, 1)


def _noisy_scenes(generator, parameters, batch, key):
    """Half of the chosen images autoencoded with noise, half with pixel noise: [B, H, W, 3]."""
    keys = jax.random.split(key, 3)
    clean = pixels(batch.chosen)
    half = len(clean) // 2
    mean, _ = generator.encode_latents(parameters, clean[:half])
    strength = 0.25 * jax.random.uniform(keys[0], (half, 1, 1, 1))
    mean = mean + strength * jax.random.normal(keys[1], mean.shape)
    decoded = generator.decode_latents(parameters, mean)
    raw = clean[half:] + 0.05 * jax.random.normal(keys[2], clean[half:].shape)
    return jnp.concatenate([decoded, raw])


def _attribute_loss(trainable, batch, images):
    """The probe's loss on images [B, H, W, 3] of a batch's scenes, and its terms."""
    maps = cast(AttributeMaps, Probe(TOYBOX).apply({"params": trainable["probe"]}, images))
    return attribute_loss(maps, batch.truth, batch.masks, batch.present, batch.truth["background"])


def init_probe(key: PRNGKeyArray) -> dict[str, Any]:
    """Returns initial parameters of the probe."""
    return dict(Probe(TOYBOX).init(key, jnp.zeros((1, 64, 64, 3)))["params"])
