"""From an image encoder's features of a subject reference image to tokens for cross-attention.

Both projections are IP-Adapter's (arXiv 2308.06721), named as diffusers names them. Each runs on
every reference slot by itself: tokens of one subject never see another's.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers

KINDS = ("resampler", "projection")
DROPPED = ("absent", "blank")


@dataclasses.dataclass(frozen=True)
class SubjectAdapterConfig:
    """Sizes of the adapter; the defaults are those of IP-Adapter-Plus for SDXL (ViT-H).

    Attributes:
      kind: "resampler" reads patch features (IP-Adapter-Plus), "projection" the pooled image
        embedding (plain IP-Adapter, 4 tokens). Width, depth and so on are the resampler's.
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
    dropped: str = "absent"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"kind = {self.kind!r}: choose one of {list(KINDS)}")
        if self.dropped not in DROPPED:
            raise UserError(f"dropped = {self.dropped!r}: choose one of {list(DROPPED)}")


def subject_adapter(config, dtype=jnp.float32):
    """The module that `config.kind` names: a `Resampler` or an `ImageProjection`."""
    return {"resampler": Resampler, "projection": ImageProjection}[config.kind](config, dtype)


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
            config.num_heads, config.num_heads * config.head_dim, output_bias=False,
            dtype=self.dtype, name="attn")
        latents = latents + attention(normed, jnp.concatenate([features, normed], axis=1))
        h = layers.LayerNorm(dtype=self.dtype, name="ff_0")(latents)
        return latents + layers.FeedForward(config.expansion, False, self.dtype, name="ff_1")(h)


class Resampler(nn.Module):
    """A Perceiver resampler: learnt queries that read a reference's patch features."""

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features):
        """Maps features [B, S, P, input_dim] of S slots to tokens [B, S, T, output_dim]."""
        config = self.config
        batch, slots = features.shape[:2]
        latents = self.param("latents", nn.initializers.normal(config.width**-0.5),
                             (1, config.num_tokens, config.width))
        latents = jnp.broadcast_to(latents.astype(self.dtype),
                                   (batch * slots, *latents.shape[1:]))
        x = features.reshape(batch * slots, *features.shape[2:])
        x = nn.Dense(config.width, dtype=self.dtype, name="proj_in")(x)
        for i in range(config.depth):
            latents = ResamplerLayer(config, self.dtype, name=f"layers_{i}")(x, latents)
        tokens = nn.Dense(config.output_dim, dtype=self.dtype, name="proj_out")(latents)
        tokens = layers.LayerNorm(dtype=self.dtype, name="norm_out")(tokens)
        return tokens.reshape(batch, slots, config.num_tokens, config.output_dim)


class ImageProjection(nn.Module):
    """One dense layer from a reference's pooled embedding to all of its tokens."""

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embeddings):
        """Maps embeddings [B, S, input_dim] of S slots to tokens [B, S, T, output_dim]."""
        config = self.config
        tokens = nn.Dense(config.num_tokens * config.output_dim, dtype=self.dtype,
                          name="image_embeds")(embeddings)
        tokens = tokens.reshape(*embeddings.shape[:2], config.num_tokens, config.output_dim)
        return layers.LayerNorm(dtype=self.dtype, name="norm")(tokens)
