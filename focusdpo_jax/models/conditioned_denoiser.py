"""The denoiser of a generator with its prompts and references, as samplers call it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focusdpo_jax.diffusion import samplers
from focusdpo_jax.models.generator import Conditioning, Generator


def conditioned_denoiser(
    generator: Generator,
    parameters: Any,
    token_ids: Int[Any, "B 2 L"],
    time_ids: Float[Any, "B 6"],
    references: Any,
    present: Bool[Any, "B S"],
    *,
    negative_token_ids: Int[Any, "2 L"] | None = None,
    image_scale: float = 1.0,
    scales: Float[Any, "B S"] | None = None,
    masks: Float[Any, "B S y x"] | None = None,
    inpainting: Float[Array, "B h w channels"] | None = None,
) -> samplers.DenoiseFn:
    """Returns the denoiser of B prompts with their references, before guidance.

    Args:
      generator: the model's pure functions.
      parameters: parameters of the generator.
      token_ids, time_ids, references, present, scales, masks: see `generate` in
        `inference.generate.make_generate`.
      negative_token_ids: int [2, L]. If given, the denoiser takes 2B latents, for
        `samplers.classifier_free_guidance`: B with prompts and references, then B with the negative
        prompt.
      image_scale: weight of the references' part of cross-attention.
      inpainting: [B, h, w, 1 + C], mask and latents of the masked image, concatenated to the
        latents for an inpainting UNet.

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
        negative_text, negative_pooled = generator.encode_negative(
            parameters, jnp.asarray(negative_token_ids)[None]
        )
        unconditional = generator.drop_references(
            parameters,
            dataclasses.replace(
                conditioning,
                text=jnp.broadcast_to(negative_text, text.shape),
                pooled=jnp.broadcast_to(negative_pooled, pooled.shape),
            ),
            jnp.ones(len(present), bool),
            generator.blank_reference(parameters),
        )
        conditioning = jax.tree.map(lambda *x: jnp.concatenate(x), conditioning, unconditional)
        if inpainting is not None:
            inpainting = jnp.concatenate([inpainting, inpainting])

    def denoise(latents, timesteps):
        if inpainting is not None:
            latents = jnp.concatenate([latents, inpainting], axis=-1)
        return generator.denoise(
            parameters, latents, timesteps, conditioning, image_scale=image_scale
        )[0]

    return denoise
