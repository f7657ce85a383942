"""Subject adapters: image encoder features of a reference image to tokens for cross-attention.

| kind | class | reads | from |
| --- | --- | --- | --- |
| "resampler" | `Resampler` | patch features | IP-Adapter-Plus (arXiv 2308.06721) |
| "projection" | `ImageProjection` | pooled embedding | IP-Adapter |
| "grounding" | `GroundingResampler` | patches, phrase, box | MS-Diffusion (arXiv 2406.07209) |

Every reference slot is processed independently: the tokens of one subject do not depend on another.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers

KINDS = ("resampler", "projection", "grounding")
DROPPED = ("absent", "blank")


@dataclasses.dataclass(frozen=True)
class SubjectAdapterConfig:
    """Sizes of the adapter; the defaults are those of IP-Adapter-Plus for SDXL (ViT-H).

    Attributes:
      kind: "resampler" (IP-Adapter-Plus), "projection" (plain IP-Adapter, 4 tokens) or "grounding"
        (MS-Diffusion); see the module.
      input_dim: channels of the features.
      output_dim: channels of the tokens, the UNet's cross_attention_dim.
      num_tokens: tokens per reference.
      width, depth, num_heads, head_dim, expansion: sizes of the resampler's transformer.
      phrase_dim: channels of a phrase's embedding, for "grounding".
      frequencies: number of frequencies of the box's Fourier features, for "grounding".
      dropped: what replaces references in the unconditional half of guidance and where training
        drops them. "absent" masks them out, as in Toybox's training. "blank" uses the tokens
        of an image of CLIP's mean colour, or of an embedding of zeros, as the code of IP-Adapter
        and diffusers does; adapters read from their files have it.

    Raises:
      UserError: `kind` or `dropped` is unknown.
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


def subject_adapter(config: SubjectAdapterConfig, dtype: Any = jnp.float32) -> nn.Module:
    """Returns the module of `config.kind`."""
    kinds = {"resampler": Resampler, "projection": ImageProjection, "grounding": GroundingResampler}
    return kinds[config.kind](config, dtype)


class ResamplerLayer(nn.Module):
    """Attention of the latents to the features and to each other, then a feed-forward."""

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch patches width"],
        latents: Float[Array, "batch tokens width"],
    ) -> Float[Array, "batch tokens width"]:
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


def _resample(
    config: SubjectAdapterConfig,
    dtype: Any,
    features: Float[Array, "batch slots patches input_dim"],
    latents: Float[Array, "references tokens width"],
    last_norm: str | None = None,
) -> Float[Array, "batch slots tokens output_dim"]:
    """Applies the layers that both resamplers share, as submodules of the calling module.

    Args:
      features: [B, S, P, input_dim].
      latents: [B * S, T, width].
      last_norm: name of a norm before the last dense layer, or None for no norm.

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
    """A Perceiver resampler: learned queries attend to the patch features of a reference.

    The layout is that of diffusers' `IPAdapterPlusImageProjection`.
    """

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch slots patches input_dim"]
    ) -> Float[Array, "batch slots tokens output_dim"]:
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
    """A dense layer from the pooled embedding of a reference to all of its tokens.

    The layout is that of diffusers' `ImageProjection`.
    """

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, "batch slots input_dim"]
    ) -> Float[Array, "batch slots tokens output_dim"]:
        """Maps embeddings [B, S, input_dim] of S slots to tokens [B, S, T, output_dim]."""
        config = self.config
        tokens = nn.Dense(
            config.num_tokens * config.output_dim, dtype=self.dtype, name="image_embeds"
        )(embeddings)
        tokens = tokens.reshape(*embeddings.shape[:2], config.num_tokens, config.output_dim)
        return layers.LayerNorm(dtype=self.dtype, name="norm")(tokens)


def box_frequencies(
    boxes: Float[Array, "references 4"], frequencies: int
) -> Float[Array, "references features"]:
    """Computes Fourier features of the edges of boxes (MS-Diffusion's `FourierEmbedder`).

    Args:
      boxes: [N, 4], x0, y0, x1, y1 in [0, 1].
      frequencies: number F of frequencies, 100^(f / F) radians for f = 0, ..., F - 1.

    Returns:
      [N, 8 F] in float32: for each frequency the four sines, then the four cosines.
    """
    rates = 100.0 ** (jnp.arange(frequencies, dtype=jnp.float32) / frequencies)
    angles = rates[:, None] * boxes.astype(jnp.float32)[:, None, :]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=2).reshape(len(boxes), -1)


class GroundingResampler(nn.Module):
    """A resampler whose queries are computed from the phrase and the box of a subject.

    The layout is that of `Resampler(latent_init_mode="grounding")` in the public code of
    MS-Diffusion/MS-Diffusion, msdiffusion/models/projection.py.
    """

    config: SubjectAdapterConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch slots patches input_dim"],
        phrases: Float[Array, "batch slots phrase_dim"] | None = None,
        boxes: Float[Array, "batch slots 4"] | None = None,
    ) -> Float[Array, "batch slots tokens output_dim"]:
        """Maps the features of S slots to tokens [B, S, T, output_dim].

        Args:
          features: [B, S, P, input_dim].
          phrases: [B, S, phrase_dim], pooled text embedding of the name of each subject.
          boxes: [B, S, 4], its position in the image to generate: x0, y0, x1, y1 in [0, 1].
            Without phrases and boxes the queries are learned parameters, as in MS-Diffusion's
            training where it drops the grounding.
        """
        config = self.config
        shape = config.num_tokens, config.width
        learned = self.param(
            "grounding_latents", nn.initializers.normal(config.width**-0.5), (1, *shape)
        )
        count = features.shape[0] * features.shape[1]
        grounded = True
        if phrases is None or boxes is None:
            # Run the layers all the same, so that `init` creates their parameters.
            grounded = False
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
