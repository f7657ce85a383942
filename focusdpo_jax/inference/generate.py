"""The jitted generation loop: one compiled program for all prompts and all parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from focusdpo_jax import compiling
from focusdpo_jax.diffusion import samplers
from focusdpo_jax.models.conditioned_denoiser import conditioned_denoiser
from focusdpo_jax.models.generator import Generator
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.sharding import mesh as meshes


def make_generate(
    generator: Generator,
    *,
    steps: int,
    guidance: float,
    negative_token_ids: Int[Any, "2 L"],
    image_scale: float = 1.0,
    sampler: str = "ddim",
) -> Callable[..., UInt8[Array, "B H W 3"]]:
    """Builds the jitted sampler.

    Args:
      generator: the model's pure functions.
      steps: number of denoiser calls.
      guidance: classifier-free guidance scale; 1 or less disables guidance, as in diffusers, at
        half the cost.
      negative_token_ids: int [2, L], the prompt of the unconditional branch: the empty prompt or a
        negative prompt. References are dropped in that branch (see `SubjectAdapterConfig`).
      image_scale: weight of the references' part of cross-attention.
      sampler: one of `samplers.SAMPLERS`.

    Returns:
      generate(parameters, token_ids [B, 2, L], time_ids [B, 6], references [B, S], present [B, S],
      noise [B, h, w, C], keys [B], scales [B, S], masks [B, S, y, x]) -> uint8 [B, H, W, 3]. The
      references are outputs of `Generator.encode_reference`. The last three arguments are optional:
      keys, one per image, for samplers that add noise at every step; scales and masks as in
      `Conditioning`.

    Raises:
      UserError: the sampler does not exist, or does not support this number of steps.
    """
    spacing, guided = generator.config.spacing, samplers.guides(guidance)
    # Tracing checks this too; the check here raises the error before the first call.
    samplers.sampling_timesteps(generator.schedule.timesteps, steps, spacing, sampler)

    @functools.partial(jax.jit, compiler_options=compiling.default_network_options())
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


def scene_noise(
    seed: int, indices: Sequence[int] | np.ndarray, shape: tuple[int, ...]
) -> Float[Array, "B h w C"]:
    """Returns initial noise [B, *shape]; a row depends only on the seed and the scene's index."""
    key = jax.random.key(seed)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices))
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def step_keys(seeds: Sequence[int]) -> PRNGKeyArray:
    """Returns the keys [B] of samplers that add noise at every step, one per image.

    They differ from the key of the initial noise, `scene_noise(seed, [0], ...)`.
    """
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), 1) for seed in seeds])


def generate_all(
    generate: Callable[..., UInt8[Array, "B H W 3"]],
    parameters: Any,
    scenes: Any,
    *,
    seed: int,
    latent_shape: tuple[int, ...],
    batch_size: int,
    place: Callable[[Any], Any],
) -> UInt8[np.ndarray, "N H W 3"]:
    """Generates an image for each of `scenes`.

    Args:
      generate: from `make_generate`.
      parameters: parameters of the generator, on the devices.
      scenes: EncodedPairs of NumPy arrays; only captions and references are read.
      seed: seed of the initial noise.
      latent_shape: (h, w, C).
      batch_size: images of a batch; the last batch is padded.
      place: puts a tree of arrays [batch_size, ...] on the devices.

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
    progress = ItemProgress("images generated", count)
    for row, image in enumerate(images):
        images[row] = meshes.fetch(image)
        progress.add(min(batch_size, count - row * batch_size))
    return np.concatenate(images)[:count]
