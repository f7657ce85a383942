"""The variational autoencoder between pixels and latents: diffusers' `AutoencoderKL`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers
from focusdpo_jax.models.attention import attend

# Of every group normalisation.
EPSILON = 1e-6

_Map = Float[Array, "batch height width channels"]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are SDXL's.

    Attributes:
      in_channels: channels of the image, both encoded and decoded.
      block_out_channels: channels of each resolution, from that of the image to the coarsest.
      layers_per_block: resnets of a resolution in the encoder; the decoder has one more.
      latent_channels: channels of the latents.
      norm_groups: groups of every group normalisation.
      mid_attention: whether the coarsest resolution has self-attention.
      scaling_factor: the latents of the diffusion model are the encoder's times this factor.

    Raises:
      UserError: `norm_groups` does not divide the channels.
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
    def factor(self) -> int:
        """Pixels per latent in each direction; image sizes are multiples of it."""
        return 2 ** (len(self.block_out_channels) - 1)


class MidAttention(nn.Module):
    """Residual single-head self-attention over the positions of a feature map."""

    norm_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Map) -> _Map:
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
    """Resnet, attention (if `config.mid_attention`), resnet."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Map) -> _Map:
        """Maps [B, H, W, C] to the same shape."""
        groups = self.config.norm_groups
        x = layers.ResnetBlock(x.shape[-1], groups, EPSILON, self.dtype, name="resnets_0")(x)
        if self.config.mid_attention:
            x = MidAttention(groups, self.dtype, name="attentions_0")(x)
        return layers.ResnetBlock(x.shape[-1], groups, EPSILON, self.dtype, name="resnets_1")(x)


class ResnetStack(nn.Module):
    """Resnets at one resolution, then an optional change of resolution.

    Attributes:
      features: output channels.
      depth: number of resnets.
      resample: "down", "up" or None.
    """

    config: VAEConfig
    features: int
    depth: int
    resample: str | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Map) -> Float[Array, "batch new_height new_width features"]:
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
    """Maps images to the moments of the latents, without `quant_conv`."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Map) -> Float[Array, "batch latent_height latent_width moments"]:
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
    """Maps latents to images, without `post_quant_conv`."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: _Map) -> Float[Array, "batch image_height image_width in_channels"]:
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

    Its latents are not scaled: a diffusion model works on them multiplied by
    `config.scaling_factor`.

    Attributes:
      config: sizes.
      dtype: type of the decoder's computation. The encoder computes in float32, as in other
        trainers: bfloat16 would leave noise in the latents that training cannot average out. SDXL's
        published weights overflow in float16; bfloat16 is safe for decoding.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers."""
        config = self.config
        self.encoder = Encoder(config, jnp.float32)
        self.decoder = Decoder(config, self.dtype)
        self.quant_conv = layers.Conv(2 * config.latent_channels, kernel_size=1)
        self.post_quant_conv = layers.Conv(config.latent_channels, kernel_size=1, dtype=self.dtype)

    def encode(
        self, images: Float[Array, "batch height width in_channels"]
    ) -> tuple[
        Float[Array, "batch latent_height latent_width channels"],
        Float[Array, "batch latent_height latent_width channels"],
    ]:
        """Computes the posterior of the latents of images.

        Args:
          images: [B, H, W, in_channels] in [-1, 1]; H and W are multiples of `config.factor`.

        Returns:
          Mean and logarithm of the variance, each [B, H / factor, W / factor, latent_channels] in
          float32. The logarithm is clipped to [-30, 20].
        """
        moments = self.quant_conv(self.encoder(images))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(
        self, latents: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch image_height image_width in_channels"]:
        """Decodes latents [B, h, w, latent_channels].

        Returns:
          Images [B, factor h, factor w, in_channels] in float32, about [-1, 1] and not clipped.
        """
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(
        self, images: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch height width in_channels"]:
        """Reconstructs images [B, H, W, in_channels] from the mean of their latents."""
        mean, _ = self.encode(images)
        return self.decode(mean)
