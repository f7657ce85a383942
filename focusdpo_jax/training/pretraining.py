"""Tasks that give a small generator its encoders before it learns to generate.

`autoencode` trains the autoencoder on scenes and references; `attributes` trains either the image
encoder, by reading attributes off its patch features, or the probe that evaluation uses. Published
models come with all of this; Toybox's are made here (`configs/toybox_base.py`).
"""

import jax
import jax.numpy as jnp
from absl import logging

from focusdpo_jax.data import toybox
from focusdpo_jax.evaluation.probe import AttributeHeads, AttributeSpace, Probe, attribute_loss

SPACE = AttributeSpace(classes=len(toybox.CLASSES), patterns=len(toybox.PATTERNS),
                       parts=len(toybox.PARTS), backgrounds=len(toybox.BACKGROUNDS))
# Weight of the divergence from a unit normal, small as in latent diffusion (arXiv 2112.10752).
_DIVERGENCE_WEIGHT = 1e-6


def first_reference(batch):
    """Each record's first subject reference, which is always there: [B, H, W, 3]."""
    return batch.references[:, 0]


def pixels(images):
    """uint8 pictures as float32 in [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 255


def autoencoder_loss(generator):
    """The loss of a variational autoencoder on both scenes and one reference of every record."""

    def loss(structure, trainable, frozen, batch, numbers, key):
        del structure, frozen, numbers
        images = pixels(jnp.concatenate([batch.chosen, first_reference(batch)]))
        mean, deviation = generator.encode_image(trainable, images)
        latents = mean + deviation * jax.random.normal(key, mean.shape)
        decoded = generator.decode_latents(trainable, latents)
        # An absolute error keeps edges sharp, a squared one keeps colours true.
        absolute, squared = jnp.abs(decoded - images).mean(), jnp.square(decoded - images).mean()
        scale = generator.config.vae.scaling_factor
        mean, deviation = mean / scale, deviation / scale
        divergence = 0.5 * (jnp.square(mean) + jnp.square(deviation) - 1
                            - 2 * jnp.log(deviation)).sum((1, 2, 3)).mean()
        total = absolute + 2 * squared + _DIVERGENCE_WEIGHT * divergence
        return total, {"absolute_error": absolute, "divergence": divergence,
                       "psnr": -10 * jnp.log10(squared)}

    return loss


def latent_scale(generator, parameters, images):
    """1 / the standard deviation of the latents of uint8 `images`: VAEConfig.scaling_factor."""
    mean, deviation = jax.jit(generator.encode_image)(parameters, pixels(images))
    scale = generator.config.vae.scaling_factor
    spread = jnp.sqrt(jnp.var(mean) + jnp.square(deviation).mean()) / scale
    logging.info("standard deviation of the latents: %.4f", spread)
    return float(1 / spread)


def image_encoder_loss(generator):
    """Reads attributes off the image encoder's penultimate patches, in scenes and references.

    The last layer learns the classes and the background of the whole picture, so that its pooled
    embedding says what CLIP's would.
    """
    heads, side = AttributeHeads(SPACE), generator.patch_grid

    def loss(structure, trainable, frozen, batch, numbers, key):
        del structure, frozen, numbers, key
        def encode(images):
            return generator.see(trainable, pixels(images))

        def read(output):
            patches = output.penultimate[:, 1:]
            grid = patches.reshape(-1, side, side, patches.shape[-1])
            return heads.apply({"params": trainable["heads"]}, grid)

        truth = batch.truth
        scenes, alone = encode(batch.chosen), encode(first_reference(batch))
        scene_loss, terms = attribute_loss(
            read(scenes), truth, batch.masks, batch.present, truth["background"])
        # A reference shows one subject on white, which is no background of a scene.
        first = {name: values[:, :1] for name, values in truth.items() if name != "background"}
        alone_loss, alone_terms = attribute_loss(
            read(alone), first, batch.reference_masks[:, :1], batch.present[:, :1],
            truth["background"])
        alone_loss = alone_loss - alone_terms["background"]
        shown = jax.nn.one_hot(truth["class_id"], SPACE.classes) * batch.present[..., None]
        named = jnp.concatenate([shown.sum(1), jax.nn.one_hot(truth["background"],
                                                              SPACE.backgrounds)], axis=-1)
        logits = scenes.projected @ trainable["heads"]["names"]
        naming = jnp.mean(jnp.maximum(logits, 0) - logits * named
                          + jnp.log1p(jnp.exp(-jnp.abs(logits))))
        terms = {f"scene_{k}": v for k, v in terms.items()} | {
            f"reference_{k}": v for k, v in alone_terms.items() if k != "background"}
        return scene_loss + alone_loss + naming, terms | {"naming": naming}

    return loss


def init_heads(generator, key):
    """Parameters of the read-outs that `image_encoder_loss` trains along and then drops."""
    config = generator.config.image_encoder
    side = generator.patch_grid
    heads = AttributeHeads(SPACE).init(
        key, jnp.zeros((1, side, side, config.hidden_size)))["params"]
    names = SPACE.classes + SPACE.backgrounds
    heads["names"] = 0.02 * jax.random.normal(key, (config.projection_dim, names))
    return heads


def probe_loss(generator):
    """Trains the probe on scenes as they are, through the autoencoder, blurred and noisy.

    Generated pictures carry the autoencoder's traces and the sampler's small errors; a probe that
    has seen only clean renders would read those as attributes.
    """
    probe = Probe(SPACE)

    def loss(structure, trainable, frozen, batch, numbers, key):
        del structure, numbers
        keys = jax.random.split(key, 4)
        clean = pixels(batch.chosen)
        mean, _ = generator.encode_image(frozen, clean)
        count = len(clean)
        strength = 0.25 * jax.random.uniform(keys[0], (count, 1, 1, 1))
        mean = mean + strength * jax.random.normal(keys[1], mean.shape)
        decoded = generator.decode_latents(frozen, mean)
        raw = clean + 0.05 * jax.random.normal(keys[2], clean.shape)
        through = jax.random.bernoulli(keys[3], 0.75, (count, 1, 1, 1))
        maps = probe.apply({"params": trainable["probe"]}, jnp.where(through, decoded, raw))

        return attribute_loss(
            maps, batch.truth, batch.masks, batch.present, batch.truth["background"])

    return loss


def init_probe(key):
    """Fresh parameters of the probe."""
    return Probe(SPACE).init(key, jnp.zeros((1, 64, 64, 3)))["params"]
