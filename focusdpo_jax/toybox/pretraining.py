"""Losses that train Toybox's autoencoder, image encoder and probe.

`autoencoder_loss` trains the autoencoder on scenes and references. `image_encoder_loss` trains the
image encoder to predict attributes from its patch features. `probe_loss` trains the probe that
evaluation uses. Published models include such encoders; Toybox's are trained here
(`configs/toybox_base.py`).

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
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

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
    trained on clean renders alone would misread these as attributes.
    """
    probe = Probe(TOYBOX)

    def loss(trainable, frozen, batch, outputs, params, key):
        del outputs, params
        keys = jax.random.split(key, 3)
        clean = pixels(batch.chosen)
        half = len(clean) // 2
        mean, _ = generator.encode_latents(frozen, clean[:half])
        strength = 0.25 * jax.random.uniform(keys[0], (half, 1, 1, 1))
        mean = mean + strength * jax.random.normal(keys[1], mean.shape)
        decoded = generator.decode_latents(frozen, mean)
        raw = clean[half:] + 0.05 * jax.random.normal(keys[2], clean[half:].shape)
        maps = probe.apply({"params": trainable["probe"]}, jnp.concatenate([decoded, raw]))
        return attribute_loss(
            cast(Any, maps), batch.truth, batch.masks, batch.present, batch.truth["background"]
        )

    return loss


def init_probe(key: PRNGKeyArray) -> dict[str, Any]:
    """Returns initial parameters of the probe."""
    return dict(Probe(TOYBOX).init(key, jnp.zeros((1, 64, 64, 3)))["params"])
