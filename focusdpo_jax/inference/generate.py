"""Images from a generator: one compiled program for all prompts and all parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax import compiling
from focusdpo_jax.diffusion import samplers
from focusdpo_jax.models.generator import Conditioning
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.sharding import mesh as meshes


def make_generate(
    generator, *, steps, guidance, negative_token_ids, image_scale=1.0, sampler="ddim"
):
    """Builds the jitted sampler.

    Args:
      steps: denoiser calls.
      guidance: classifier-free guidance scale; 1 or less is none, as in diffusers, and costs half.
      negative_token_ids: int [2, L], what guidance leads away from: the empty prompt, or one that
        says what not to show. The references are dropped there (see `SubjectAdapterConfig`).
      image_scale: weight of the references' part of cross-attention.
      sampler: one of `samplers.SAMPLERS`.

    Raises:
      UserError: there is no such sampler, or it cannot take so many steps.

    Returns:
      generate(parameters, token_ids [B, 2, L], time_ids [B, 6], references [B, S],
      present [B, S], noise [B, h, w, C], keys [B], scales [B, S], masks [B, S, y, x]) ->
      uint8 [B, H, W, 3]. The references are what `Generator.encode_reference` says of them. The last three may
      be left out: the keys, one an image, are for samplers that draw noise on the way, scales
      and masks are those of `Conditioning`.
    """
    spacing, guided = generator.config.spacing, samplers.guides(guidance)
    # Once more when it is traced; here it is early enough to tell the user.
    samplers.sampling_timesteps(generator.schedule.timesteps, steps, spacing, sampler)

    @functools.partial(jax.jit, compiler_options=compiling.networks_here())
    def generate(
        parameters,
        token_ids,
        time_ids,
        references,
        present,
        noise,
        keys=None,
        scales=None,
        masks=None,
    ):
        denoise = conditioned_denoiser(
            generator,
            parameters,
            token_ids,
            time_ids,
            references,
            present,
            negative_token_ids=negative_token_ids if guided else None,
            image_scale=image_scale,
            scales=scales,
            masks=masks,
        )
        if guided:
            denoise = samplers.classifier_free_guidance(denoise, guidance)
        latents = samplers.sample(
            denoise, generator.schedule, noise, steps, spacing, sampler=sampler, keys=keys
        )
        pixels = jnp.clip(generator.decode_latents(parameters, latents), 0, 1)
        return jnp.round(pixels * 255).astype(jnp.uint8)

    return generate


def conditioned_denoiser(
    generator,
    parameters,
    token_ids,
    time_ids,
    references,
    present,
    *,
    negative_token_ids=None,
    image_scale=1.0,
    scales=None,
    masks=None,
    inpainting=None,
):
    """The denoiser of B prompts with their references, without guidance.

    Args:
      token_ids, time_ids, references, present, scales, masks: as `generate` of `make_generate`.
      negative_token_ids: int [2, L]. With them the denoiser is one of 2B latents, for
        `samplers.classifier_free_guidance`: B with prompts and references, then B with these alone.
      image_scale: see `make_generate`.
      inpainting: [B, h, w, 1 + C], mask and latents of the masked image, which an inpainting UNet
        reads behind the latents.

    Returns:
      (latents [B or 2B, h, w, C], timesteps [B or 2B]) -> prediction.
    """
    text, pooled = generator.encode_text(parameters, token_ids)
    conditioning = Conditioning(
        text=text,
        pooled=pooled,
        time_ids=time_ids,
        image_present=present,
        image_tokens=generator.subject_tokens(parameters, references),
        image_scales=scales,
        image_masks=masks,
    )
    if negative_token_ids is not None:
        other_text, other_pooled = generator.encode_negative(
            parameters, jnp.asarray(negative_token_ids)[None]
        )
        without = generator.drop_references(
            parameters,
            conditioning.replace(
                text=jnp.broadcast_to(other_text, text.shape),
                pooled=jnp.broadcast_to(other_pooled, pooled.shape),
            ),
            jnp.ones(len(present), bool),
            generator.blank_reference(parameters),
        )
        conditioning = jax.tree.map(lambda *x: jnp.concatenate(x), conditioning, without)
        if inpainting is not None:
            inpainting = jnp.concatenate([inpainting, inpainting])

    def denoise(latents, timesteps):
        if inpainting is not None:
            latents = jnp.concatenate([latents, inpainting], axis=-1)
        return generator.denoise(
            parameters, latents, timesteps, conditioning, image_scale=image_scale
        )[0]

    return denoise


def scene_noise(seed, indices, shape):
    """Starting noise [B, h, w, C] that depends on the seed and each scene's index alone."""
    key = jax.random.key(seed)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices))
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def generate_all(generate, parameters, scenes, *, seed, latent_shape, batch_size, place):
    """Generates an image for each of `scenes`.

    Args:
      generate: from `make_generate`.
      scenes: EncodedPairs of numpy arrays; the references and captions are used.
      batch_size: images at once; the last batch is filled up.
      place: puts a tree of arrays [batch_size, ...] where the parameters are.

    Returns:
      uint8 [len(scenes), H, W, 3], on the host.
    """
    count, images = len(scenes.present), []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        noise = scene_noise(seed, scenes.index[rows], latent_shape)
        inputs = jax.tree.map(
            lambda x, rows=rows: x[rows],
            (scenes.token_ids, scenes.time_ids, scenes.references, scenes.present),
        )
        images.append(generate(parameters, *place((*inputs, noise))))
    progress = Progress("images drawn", count)
    for row, image in enumerate(images):
        images[row] = meshes.fetch(image)
        progress.add(min(batch_size, count - row * batch_size))
    return np.concatenate(images)[:count]
