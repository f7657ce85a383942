"""From an image encoder's features of a subject reference image to tokens for cross-attention.

Two of them are IP-Adapter's (arXiv 2308.06721), named as diffusers names them; the third is
MS-Diffusion's (arXiv 2406.07209), which also reads what a subject is called and where it shall
stand. Each runs on every reference slot by itself: tokens of one subject never see another's.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers

KINDS = ("resampler", "projection", "grounding")
DROPPED = ("absent", "blank")


@dataclasses.dataclass(frozen=True)
class SubjectAdapterConfig:
    """Sizes of the adapter; the defaults are those of IP-Adapter-Plus for SDXL (ViT-H).

    Attributes:
      kind: "resampler" reads patch features (IP-Adapter-Plus), "projection" the pooled image
        embedding (plain IP-Adapter, 4 tokens), "grounding" patch features, a phrase and a box
        (MS-Diffusion). Width, depth and so on are the resamplers'.
      phrase_dim, frequencies: of "grounding", the width of a phrase's embedding, and the
        frequencies at which each edge of a box is seen.
      dropped: what takes the place of references where there shall be none: in the unconditional
        half of guidance, and where training drops them. "absent" is no token at all, which is
        what Toybox's adapter was trained with. "blank" is the tokens of an image that says
        nothing, one of CLIP's mean colour or an embedding of zeros, which is what IP-Adapter's
        and diffusers' own code takes: adapters that are read from their files have it.
      input_dim: width of the features.
      output_dim: width of the tokens, the UNet's cross_attention_dim.
      num_tokens: tokens a reference.
      width, depth, num_heads, head_dim, expansion: of the resampler's transformer.
    """

    kind: str = "resampler"
    input_dim: int = 1280
    output_dim: int = 2048
    num_tokens: int = 16
    width: int = 1280
    depth: int = 4
    num_heads: int = 20
    head_dim: int = 64
    expansion: int = 4
    phrase_dim: int = 768
    frequencies: int = 8
    dropped: str = "absent"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"kind = {self.kind!r}: choose one of {list(KINDS)}")
        if self.dropped not in DROPPED:
            raise UserError(f"dropped = {self.dropped!r}: choose one of {list(DROPPED)}")


def subject_adapter(config, dtype=jnp.float32):
    """The module that `config.kind` names."""
    kinds = {"resampler": Resampler, "projection": ImageProjection, "grounding": GroundingResampler}
    return kinds[config.kind](config, dtype)


class ResamplerLayer(nn.Module):
    """Latents attend to the features and to each other, then a feed-forward."""

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features, latents):
        """Maps features [N, P, width] and latents [N, T, width] to latents."""
        config = self.config
        features = layers.LayerNorm(dtype=self.dtype, name="ln0")(features)
        normed = layers.LayerNorm(dtype=self.dtype, name="ln1")(latents)
        attention = layers.Attention(
            config.num_heads,
            config.num_heads * config.head_dim,
            output_bias=False,
            dtype=self.dtype,
            name="attn",
        )
        latents = latents + attention(normed, jnp.concatenate([features, normed], axis=1))
        h = layers.LayerNorm(dtype=self.dtype, name="ff_0")(latents)
        return latents + layers.FeedForward(config.expansion, False, self.dtype, name="ff_1")(h)


def _resample(config, dtype, features, latents, last_norm=None):
    """What both resamplers do, as submodules of the one that calls it.

    Args:
      features: [B, S, P, input_dim].
      latents: [B * S, T, width].
      last_norm: name of a norm before the last dense layer, or None.

    Returns:
      Tokens [B, S, T, output_dim].
    """
    x = features.reshape(-1, *features.shape[2:])
    x = nn.Dense(config.width, dtype=dtype, name="proj_in")(x)
    for i in range(config.depth):
        latents = ResamplerLayer(config, dtype, name=f"layers_{i}")(x, latents)
    if last_norm:
        latents = layers.LayerNorm(dtype=dtype, name=last_norm)(latents)
    tokens = nn.Dense(config.output_dim, dtype=dtype, name="proj_out")(latents)
    tokens = layers.LayerNorm(dtype=dtype, name="norm_out")(tokens)
    return tokens.reshape(*features.shape[:2], *tokens.shape[1:])


class Resampler(nn.Module):
    """A Perceiver resampler: learnt queries that read a reference's patch features."""

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features):
        """Maps features [B, S, P, input_dim] of S slots to tokens [B, S, T, output_dim]."""
        config = self.config
        batch, slots = features.shape[:2]
        latents = self.param(
            "latents",
            nn.initializers.normal(config.width**-0.5),
            (1, config.num_tokens, config.width),
        )
        latents = jnp.broadcast_to(latents.astype(self.dtype), (batch * slots, *latents.shape[1:]))
        return _resample(config, self.dtype, features, latents)


class ImageProjection(nn.Module):
    """One dense layer from a reference's pooled embedding to all of its tokens."""

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embeddings):
        """Maps embeddings [B, S, input_dim] of S slots to tokens [B, S, T, output_dim]."""
        config = self.config
        tokens = nn.Dense(
            config.num_tokens * config.output_dim, dtype=self.dtype, name="image_embeds"
        )(embeddings)
        tokens = tokens.reshape(*embeddings.shape[:2], config.num_tokens, config.output_dim)
        return layers.LayerNorm(dtype=self.dtype, name="norm")(tokens)


def box_frequencies(boxes, frequencies):
    """Sines and cosines of a box's edges, as MS-Diffusion's `FourierEmbedder` lays them out.

    Args:
      boxes: [N, 4], x0, y0, x1, y1 in [0, 1].
      frequencies: F of them, 100^(f / F) radians for f from 0.

    Returns:
      [N, 8 F] in float32: for each frequency the four sines, then the four cosines.
    """
    rates = 100.0 ** (jnp.arange(frequencies, dtype=jnp.float32) / frequencies)
    angles = rates[:, None] * boxes.astype(jnp.float32)[:, None, :]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=2).reshape(len(boxes), -1)


class GroundingResampler(nn.Module):
    """A resampler whose queries are made of a subject's phrase and box (MS-Diffusion).

    The layout is that of `Resampler(latent_init_mode="grounding")` in the public code of
    MS-Diffusion/MS-Diffusion, msdiffusion/models/projection.py.
    """

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features, phrases=None, boxes=None):
        """Maps S slots to tokens [B, S, T, output_dim].

        Args:
          features: [B, S, P, input_dim].
          phrases: [B, S, phrase_dim], pooled text embedding of what each subject is called.
          boxes: [B, S, 4], where it shall stand: x0, y0, x1, y1 in [0, 1]. Without phrases and
            boxes the queries are learned ones, as in the part of MS-Diffusion's training that
            drops the grounding.
        """
        config = self.config
        shape = config.num_tokens, config.width
        learned = self.param(
            "grounding_latents", nn.initializers.normal(config.width**-0.5), (1, *shape)
        )
        count = features.shape[0] * features.shape[1]
        grounded = phrases is not None
        if not grounded:  # The layers are made all the same, so that they have parameters.
            phrases, boxes = jnp.zeros((count, config.phrase_dim)), jnp.zeros((count, 4))
        ground = jnp.concatenate(
            [
                phrases.reshape(count, -1).astype(jnp.float32),
                box_frequencies(boxes.reshape(count, 4), config.frequencies),
            ],
            axis=-1,
        )
        latents = nn.Dense(2 * ground.shape[-1], dtype=self.dtype, name="latent_proj_0")(ground)
        latents = nn.Dense(shape[0] * shape[1], dtype=self.dtype, name="latent_proj_2")(
            nn.gelu(latents, approximate=False)
        )
        latents = layers.LayerNorm(dtype=self.dtype, name="latent_norm")(
            latents.reshape(count, *shape)
        )
        if not grounded:
            latents = jnp.broadcast_to(learned.astype(self.dtype), latents.shape)
        return _resample(config, self.dtype, features, latents, "attention_norm")
