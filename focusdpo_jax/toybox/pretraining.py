"""Tasks that give a small generator its encoders before it learns to generate.

`autoencode` trains the autoencoder on scenes and references; `attributes` trains either the image
encoder, by reading attributes off its patch features, or the probe that evaluation uses. Published
models come with all of this; Toybox's are made here (`configs/toybox_base.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax.models.generator import Generator
from focusdpo_jax.toybox.probe import TOYBOX, AttributeHeads, Probe, attribute_loss

# Weight of the divergence from a unit normal, small as in latent diffusion (arXiv 2112.10752).
_DIVERGENCE_WEIGHT = 1e-6


def first_reference(batch):
    """Each record's first subject reference, which is always there: [B, H, W, 3]."""
    return batch.references[:, 0]


def pixels(images):
    """uint8 images as float32 in [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 255


def crops_around(images, masks, key, size):
    """Square crops [B, size, size, 3] of images [B, H, W, 3] near what bool `masks` [B, H, W] mark.

    A crop's middle is the mask's, moved at random by a few pixels and kept inside the image.
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


def _reconstruction(generator, parameters, images, key):
    """Loss and terms of one pass of `images` [B, H, W, 3] in [0, 1] through the autoencoder."""
    mean, deviation = generator.encode_latents(parameters, images)
    decoded = generator.decode_latents(
        parameters, mean + deviation * jax.random.normal(key, mean.shape)
    )
    # An absolute error keeps edges sharp, a squared one keeps colours true.
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


def autoencoder_loss(generator):
    """The loss of a variational autoencoder on crops around subjects, and a few whole scenes.

    The subjects are what is hard about the images: crops around them, in scenes and references,
    teach as much as whole images do in a fraction of the time. Whole ones keep the statistics of
    the group normalisations true.
    """

    def loss(trainable, frozen, batch, guidance, numbers, key):
        del frozen, guidance, numbers
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


def with_latent_scale(model, parameters, images):
    """The model with VAEConfig.scaling_factor such that the latents of uint8 `images` vary by 1."""
    generator = model.generator
    mean, deviation = jax.jit(generator.encode_latents)(parameters, pixels(images))
    scale = generator.config.vae.scaling_factor
    spread = float(jnp.sqrt(jnp.var(mean) + jnp.square(deviation).mean()) / scale)
    logging.info("standard deviation of the latents: %.4f", spread)
    vae = dataclasses.replace(generator.config.vae, scaling_factor=round(1 / spread, 5))
    config = dataclasses.replace(generator.config, vae=vae)
    return dataclasses.replace(model, generator=Generator(config))


def image_encoder_loss(generator):
    """Reads attributes off the image encoder's penultimate patches, in scenes and references.

    The last layer learns the classes and the background of the whole image, so that its pooled
    embedding says what CLIP's would.
    """
    heads, side = AttributeHeads(TOYBOX), generator.patch_grid

    def loss(trainable, frozen, batch, guidance, numbers, key):
        del frozen, guidance, numbers, key

        def encode(images):
            return generator.encode_image(trainable, pixels(images))

        def read(output):
            patches = output.penultimate[:, 1:]
            grid = patches.reshape(-1, side, side, patches.shape[-1])
            return heads.apply({"params": trainable["heads"]}, grid)

        truth = batch.truth
        scenes, alone = encode(batch.chosen), encode(first_reference(batch))
        scene_loss, terms = attribute_loss(
            read(scenes), truth, batch.masks, batch.present, truth["background"]
        )
        # A reference shows one subject on white, which is no background of a scene.
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
        named = jnp.concatenate(
            [shown.sum(1), jax.nn.one_hot(truth["background"], TOYBOX.backgrounds)], axis=-1
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


def init_heads(generator, key):
    """Parameters of the read-outs that `image_encoder_loss` trains along and then drops."""
    config = generator.config.image_encoder
    side = generator.patch_grid
    heads = AttributeHeads(TOYBOX).init(key, jnp.zeros((1, side, side, config.hidden_size)))[
        "params"
    ]
    names = TOYBOX.classes + TOYBOX.backgrounds
    heads["names"] = 0.02 * jax.random.normal(key, (config.projection_dim, names))
    return heads


def probe_loss(generator):
    """Trains the probe on scenes as they are and, one half, through the autoencoder with noise.

    Generated images carry the autoencoder's traces and the sampler's small errors; a probe that
    has seen only clean renders would read those as attributes.
    """
    probe = Probe(TOYBOX)

    def loss(trainable, frozen, batch, guidance, numbers, key):
        del guidance, numbers
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
            maps, batch.truth, batch.masks, batch.present, batch.truth["background"]
        )

    return loss


def init_probe(key):
    """Fresh parameters of the probe."""
    return Probe(TOYBOX).init(key, jnp.zeros((1, 64, 64, 3)))["params"]
