"""The autoencoder between pixels and latents: diffusers' `AutoencoderKL`, SDXL's by default."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers
from focusdpo_jax.models.attention import attend

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are SDXL's.

    Attributes:
      in_channels: of the image, at both ends.
      block_out_channels: width of each resolution, from the image's downwards.
      layers_per_block: resnets of a resolution in the encoder; the decoder has one more.
      latent_channels: of the latents.
      norm_groups: groups of every group normalisation.
      mid_attention: whether the coarsest resolution has self-attention.
      scaling_factor: the diffusion model's latents are this many times the encoder's mean.
    """

    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    mid_attention: bool = True
    scaling_factor: float = 0.13025

    def __post_init__(self):
        for width in self.block_out_channels:
            if width % self.norm_groups:
                raise UserError(
                    f"block_out_channels = {self.block_out_channels}: {width} must be "
                    f"a multiple of norm_groups = {self.norm_groups}"
                )

    @property
    def factor(self):
        """Pixels a latent covers in each direction: image sizes are multiples of it."""
        return 2 ** (len(self.block_out_channels) - 1)


class MidAttention(nn.Module):
    """Self-attention with one head over the positions of a feature map, added to it."""

    norm_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to the same shape."""
        h = layers.GroupNorm(self.norm_groups, EPSILON, self.dtype, name="group_norm")(x)
        query = h.reshape(h.shape[0], -1, h.shape[-1])
        width = h.shape[-1]
        dense = {
            name: nn.Dense(width, dtype=self.dtype, name=name)
            for name in ("to_q", "to_k", "to_v", "to_out_0")
        }
        h = attend(dense["to_q"](query), dense["to_k"](query), dense["to_v"](query), 1)
        return x + dense["to_out_0"](h).reshape(x.shape)


class MidBlock(nn.Module):
    """Two resnets around the attention."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to the same shape."""
        groups = self.config.norm_groups
        x = layers.ResnetBlock(x.shape[-1], groups, EPSILON, self.dtype, name="resnets_0")(x)
        if self.config.mid_attention:
            x = MidAttention(groups, self.dtype, name="attentions_0")(x)
        return layers.ResnetBlock(x.shape[-1], groups, EPSILON, self.dtype, name="resnets_1")(x)


class ResnetStack(nn.Module):
    """Resnets at one resolution, then a change of resolution: "down", "up" or None."""

    config: VAEConfig
    features: int
    depth: int
    resample: str | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to [B, H', W', features]."""
        for i in range(self.depth):
            x = layers.ResnetBlock(
                self.features, self.config.norm_groups, EPSILON, self.dtype, name=f"resnets_{i}"
            )(x)
        if self.resample == "down":
            x = layers.Downsample(((0, 1), (0, 1)), self.dtype, name="downsamplers_0")(x)
        elif self.resample == "up":
            x = layers.Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Images to the moments of the latents, before `quant_conv`."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, in_channels] to [B, H / factor, W / factor, 2 latent_channels]."""
        config = self.config
        last = len(config.block_out_channels) - 1
        x = layers.Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(config.block_out_channels):
            x = ResnetStack(
                config,
                width,
                config.layers_per_block,
                "down" if i < last else None,
                self.dtype,
                name=f"down_blocks_{i}",
            )(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        x = layers.GroupNorm(config.norm_groups, EPSILON, self.dtype, name="conv_norm_out")(x)
        return layers.Conv(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(
            nn.silu(x)
        )


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to images."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, h, w, latent_channels] to [B, factor h, factor w, in_channels]."""
        config = self.config
        widths = config.block_out_channels[::-1]
        x = layers.Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        x = MidBlock(config, self.dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            resample = "up" if i < len(widths) - 1 else None
            x = ResnetStack(
                config,
                width,
                config.layers_per_block + 1,
                resample,
                self.dtype,
                name=f"up_blocks_{i}",
            )(x)
        x = layers.GroupNorm(config.norm_groups, EPSILON, self.dtype, name="conv_norm_out")(x)
        return layers.Conv(config.in_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))


class VAE(nn.Module):
    """A variational autoencoder; call `encode` and `decode` with `apply(..., method=...)`.

    The latents here are the encoder's own: a diffusion model works on them multiplied by
    `config.scaling_factor`. `dtype` is the decoder's. The encoder computes in float32, as trainers do: its
    latents are what every step learns from, and bfloat16 leaves noise in them that training cannot
    average out. SDXL's published weights overflow in float16; bfloat16 is safe for decoding.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Creates the layers."""
        config = self.config
        self.encoder = Encoder(config, jnp.float32)
        self.decoder = Decoder(config, self.dtype)
        self.quant_conv = layers.Conv(2 * config.latent_channels, kernel_size=1)
        self.post_quant_conv = layers.Conv(config.latent_channels, kernel_size=1, dtype=self.dtype)

    def encode(self, images):
        """The posterior of the latents of images.

        Args:
          images: [B, H, W, in_channels] in [-1, 1]; H and W are multiples of `config.factor`.

        Returns:
          Mean and logarithm of the variance, in [-30, 20], each [B, H / factor, W / factor,
          latent_channels] in float32.
        """
        moments = self.quant_conv(self.encoder(images))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents):
        """Maps [B, h, w, latent_channels] to images [B, factor h, factor w, in_channels].

        The images are in float32, about [-1, 1], and not clipped.
        """
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images):
        """The reconstruction from the mean: [B, H, W, in_channels] to the same shape."""
        mean, _ = self.encode(images)
        return self.decode(mean)
