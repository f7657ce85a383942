"""CLIP's text and image encoders (arXiv 2103.00020), in the layout of transformers.

SDXL uses two text encoders: the penultimate hidden states of both, concatenated, and the projected
pooled output of the second. IP-Adapter-Plus uses the penultimate hidden states of the image
encoder, IP-Adapter its projected pooled output.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers
from focusdpo_jax.models.attention import attend

# `eos_token_id` of files from before transformers stored the right value: the end of text is then
# the highest id of the prompt.
LEGACY_EOS = 2
# Per channel, of the pixels in [0, 1] that CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text encoder; the defaults are those of SDXL's first, CLIP ViT-L/14.

    Attributes:
      vocab_size: tokens in the vocabulary.
      max_length: tokens of the longest text.
      hidden_size, num_layers, num_heads, intermediate_size: sizes of the transformer.
      activation: "quick_gelu" or "gelu".
      projection_dim: channels of the projected pooled output; None for no projection.
      eos_token_id: the token whose position is pooled; 2 means the highest id of the prompt.

    Raises:
      UserError: the activation is unknown, or `num_heads` does not divide `hidden_size`.
    """

    vocab_size: int = 49408
    max_length: int = 77
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "quick_gelu"
    projection_dim: int | None = None
    eos_token_id: int = LEGACY_EOS

    def __post_init__(self):
        _check_sizes(self)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of an image encoder; the defaults are those of ViT-H/14, which IP-Adapter-Plus uses.

    Attributes:
      image_size: side of the square image, in pixels; a multiple of `patch_size`.
      patch_size: side of a patch, in pixels.
      hidden_size, num_layers, num_heads, intermediate_size, activation: sizes and activation of the
        transformer.
      projection_dim: channels of the projected pooled output; None for no projection.

    Raises:
      UserError: a size is not a multiple of another, or the activation is unknown.
    """

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    intermediate_size: int = 5120
    activation: str = "gelu"
    projection_dim: int | None = 1024

    def __post_init__(self):
        _check_sizes(self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size = {self.image_size}: make it a multiple of "
                f"patch_size = {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Patches of an image; the transformer's sequence has one token more."""
        return (self.image_size // self.patch_size) ** 2


def _check_sizes(config: "CLIPTextConfig | CLIPVisionConfig") -> None:
    if config.activation not in layers.ACTIVATIONS:
        raise UserError(
            f"activation = {config.activation!r}: choose one of {list(layers.ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"hidden_size = {config.hidden_size}: make it a multiple of "
            f"num_heads = {config.num_heads}"
        )


class CLIPOutput(NamedTuple):
    """The outputs of a text or image encoder.

    Attributes:
      last: [B, N, C], hidden states after the last layer; the text encoder's are normalised.
      penultimate: [B, N, C], hidden states before the last layer, not normalised (transformers'
        `hidden_states[-2]`).
      pooled: [B, C], normalised state of the end-of-text or of the class token.
      projected: [B, projection_dim], or None for an encoder without projection.
    """

    last: Float[Array, "batch tokens channels"]
    penultimate: Float[Array, "batch tokens channels"]
    pooled: Float[Array, "batch channels"]
    projected: Any  # Float[Array, "batch projection"] | None


class SelfAttention(nn.Module):
    """Multi-head self-attention; all projections have a bias."""

    num_heads: int
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        query, key, value = (
            nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = attend(query, key, value, self.num_heads, causal=self.causal)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out_proj")(out)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, pre-norm and residual."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        config = self.config
        h = layers.LayerNorm(dtype=self.dtype, name="layer_norm1")(x)
        x = x + SelfAttention(config.num_heads, self.causal, self.dtype, name="self_attn")(h)
        h = layers.LayerNorm(dtype=self.dtype, name="layer_norm2")(x)
        mlp = layers.MLP(config.intermediate_size, config.activation, self.dtype, name="mlp")
        return x + mlp(h)


class Encoder(nn.Module):
    """The stack of transformer layers."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> tuple[Float[Array, "batch tokens channels"], Float[Array, "batch tokens channels"]]:
        """Returns the hidden states after the last layer and before it, each [B, N, C]."""
        before = x
        for i in range(self.config.num_layers):
            before = x
            x = EncoderLayer(self.config, self.causal, self.dtype, name=f"layers_{i}")(x)
        return x, before


class TextEmbeddings(nn.Module):
    """Token plus position embeddings."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens channels"]:
        """Maps token ids [B, L] to [B, L, C]."""
        config = self.config
        table = nn.initializers.normal(0.02)
        tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            embedding_init=table,
            name="token_embedding",
        )(ids)
        positions = nn.Embed(
            config.max_length,
            config.hidden_size,
            dtype=self.dtype,
            embedding_init=table,
            name="position_embedding",
        )
        return tokens + positions(jnp.arange(ids.shape[1]))


class TextTransformer(nn.Module):
    """The text encoder without projection."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch tokens"]
    ) -> tuple[
        Float[Array, "batch tokens channels"],
        Float[Array, "batch tokens channels"],
        Float[Array, "batch channels"],
    ]:
        """Maps token ids [B, L] to `last`, `penultimate` and `pooled` of `CLIPOutput`."""
        config = self.config
        x = TextEmbeddings(config, self.dtype, name="embeddings")(ids)
        x, penultimate = Encoder(config, True, self.dtype, name="encoder")(x)
        x = layers.LayerNorm(dtype=self.dtype, name="final_layer_norm")(x)
        legacy = config.eos_token_id == LEGACY_EOS
        end = jnp.argmax(ids if legacy else ids == config.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return x, penultimate, pooled


class CLIPText(nn.Module):
    """A text encoder, with a projection if `config.projection_dim` is not None."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "batch tokens"]) -> CLIPOutput:
        """Encodes token ids, int [B, L] with L <= max_length."""
        last, penultimate, pooled = TextTransformer(self.config, self.dtype, name="text_model")(ids)
        projected = None
        if self.config.projection_dim is not None:
            projected = nn.Dense(
                self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
            )(pooled)
        return CLIPOutput(last, penultimate, pooled, projected)


class VisionEmbeddings(nn.Module):
    """Class token and patch embeddings plus position embeddings."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, image_size, image_size, 3] to [B, 1 + num_patches, C]."""
        config = self.config
        size = config.patch_size
        patches = layers.Conv(
            config.hidden_size,
            kernel_size=size,
            stride=size,
            padding=((0, 0), (0, 0)),
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        patches = patches.reshape(images.shape[0], -1, config.hidden_size)
        table = nn.initializers.normal(0.02)
        first = self.param("class_embedding", table, (config.hidden_size,)).astype(self.dtype)
        first = jnp.broadcast_to(first, (images.shape[0], 1, config.hidden_size))
        positions = nn.Embed(
            1 + config.num_patches,
            config.hidden_size,
            dtype=self.dtype,
            embedding_init=table,
            name="position_embedding",
        )
        return jnp.concatenate([first, patches], axis=1) + positions(
            jnp.arange(1 + config.num_patches)
        )


class VisionTransformer(nn.Module):
    """The image encoder without projection."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> tuple[
        Float[Array, "batch tokens channels"],
        Float[Array, "batch tokens channels"],
        Float[Array, "batch channels"],
    ]:
        """Maps images to `last`, `penultimate` and `pooled` of `CLIPOutput`."""
        x = VisionEmbeddings(self.config, self.dtype, name="embeddings")(images)
        # The published files have this misspelling.
        x = layers.LayerNorm(dtype=self.dtype, name="pre_layrnorm")(x)
        x, penultimate = Encoder(self.config, False, self.dtype, name="encoder")(x)
        pooled = layers.LayerNorm(dtype=self.dtype, name="post_layernorm")(x[:, 0])
        return x, penultimate, pooled


class CLIPVision(nn.Module):
    """An image encoder, with a projection if `config.projection_dim` is not None."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> CLIPOutput:
        """Encodes images; the sequence is the class token, then the patches row by row.

        Args:
          images: [B, image_size, image_size, 3], normalised by `normalise_images`.
        """
        last, penultimate, pooled = VisionTransformer(self.config, self.dtype, name="vision_model")(
            images
        )
        projected = None
        if self.config.projection_dim is not None:
            projected = nn.Dense(
                self.config.projection_dim,
                use_bias=False,
                dtype=self.dtype,
                name="visual_projection",
            )(pooled)
        return CLIPOutput(last, penultimate, pooled, projected)


def normalise_images(images: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Normalises images [..., 3] in [0, 1] with CLIP's mean and standard deviation."""
    return (images - jnp.array(MEAN, images.dtype)) / jnp.array(DEVIATION, images.dtype)
