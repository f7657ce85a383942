"""The vision transformers of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).

DINOv2 has a learned scale on every residual branch, and another epsilon in its norms. Submodules
are named after the tensors of transformers' Dinov2Model; `checkpoints/dino.py` reads the published
files of both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers
from focusdpo_jax.models.attention import attend


@dataclasses.dataclass(frozen=True)
class DINOConfig:
    """Sizes of a vision transformer; the defaults are those of DINO ViT-S/16.

    Attributes:
      image_size: side of the square image of the stored position embeddings, in pixels. For images
        of other sizes they are interpolated.
      patch_size: side of a patch, in pixels.
      hidden_size, num_layers, num_heads, intermediate_size: sizes of the transformer.
      epsilon: epsilon of every norm.
      layer_scale: whether each residual branch is scaled per channel (DINOv2).

    Raises:
      UserError: `num_heads` does not divide `hidden_size`, or a patch is larger than the image.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    intermediate_size: int = 1536
    epsilon: float = 1e-12
    layer_scale: bool = False

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size = {self.hidden_size}: make it a multiple of "
                f"num_heads = {self.num_heads}"
            )
        if self.image_size < self.patch_size:
            raise UserError(
                f"image_size = {self.image_size}: make it at least patch_size = {self.patch_size}"
            )

    @property
    def grid_size(self) -> int:
        """Patches along a side of the image of the stored position embeddings."""
        return self.image_size // self.patch_size


class DINOOutput(NamedTuple):
    """The outputs of the transformer.

    Attributes:
      last: [B, 1 + N, C], normalised hidden states after the last layer: the class token, then the
        patches row by row.
      pooled: [B, C], the class token of `last`.
      captured: {layer: hidden states [B, 1 + N, C], not normalised} of the requested layers.
    """

    last: Float[Array, "batch tokens channels"]
    pooled: Float[Array, "batch channels"]
    captured: dict[int, Float[Array, "batch tokens channels"]]


def interpolate_positions(
    positions: Float[Array, "1 stored channels"], grid: tuple[int, int]
) -> Float[Array, "1 tokens channels"]:
    """Interpolates position embeddings to another grid of patches, bicubic as transformers does.

    Args:
      positions: [1, 1 + S * S, C], of the class token and of a square grid of patches.
      grid: (rows, columns) of the new grid.

    Returns:
      [1, 1 + rows * columns, C] in float32.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    positions = positions.astype(jnp.float32)
    if grid == (side, side):
        return positions
    square = positions[0, 1:].reshape(side, side, -1)
    row_weights, column_weights = (layers.bicubic_weights(side, new) for new in grid)
    patches = jnp.einsum(
        "ri,cj,ijd->rcd",
        row_weights,
        column_weights,
        square,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.concatenate([positions[:, :1], patches.reshape(1, -1, square.shape[-1])], axis=1)


class PatchEmbeddings(nn.Module):
    """Linear embedding of each patch."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns channels"]:
        """Maps [B, H, W, 3] to [B, H // patch_size, W // patch_size, C]."""
        size = self.config.patch_size
        return layers.Conv(
            self.config.hidden_size,
            kernel_size=size,
            stride=size,
            padding=((0, 0), (0, 0)),
            dtype=self.dtype,
            name="projection",
        )(images)


class Embeddings(nn.Module):
    """Class token and patch embeddings plus position embeddings."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, H, W, 3] to [B, 1 + N, C]."""
        config = self.config
        patches = PatchEmbeddings(config, self.dtype, name="patch_embeddings")(images)
        batch, rows, columns, channels = patches.shape
        table = nn.initializers.normal(0.02)
        first = self.param("cls_token", table, (1, 1, channels)).astype(self.dtype)
        first = jnp.broadcast_to(first, (batch, 1, channels))
        positions = self.param("position_embeddings", table, (1, 1 + config.grid_size**2, channels))
        positions = interpolate_positions(positions, (rows, columns)).astype(self.dtype)
        return jnp.concatenate([first, patches.reshape(batch, -1, channels)], axis=1) + positions


class SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        query, key, value = (
            nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        return attend(query, key, value, self.num_heads)


class AttentionOutput(nn.Module):
    """The output projection of attention, a separate module in the files."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        h = SelfAttention(self.num_heads, self.dtype, name="attention")(x)
        return AttentionOutput(self.dtype, name="output")(h)


class LayerScale(nn.Module):
    """A learned factor per channel (LayerScale, arXiv 2103.17239)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        return x * self.param("lambda1", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)


class Layer(nn.Module):
    """Self-attention and feed-forward: pre-norm, LayerScale in DINOv2, and residual."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> Float[Array, "batch tokens channels"]:
        """Maps [B, N, C] to the same shape."""
        config = self.config
        attention = Attention(config.num_heads, self.dtype, name="attention")
        mlp = layers.MLP(config.intermediate_size, dtype=self.dtype, name="mlp")
        for number, branch in ((1, attention), (2, mlp)):
            h = layers.LayerNorm(config.epsilon, self.dtype, name=f"norm{number}")(x)
            h = branch(h)
            if config.layer_scale:
                h = LayerScale(self.dtype, name=f"layer_scale{number}")(h)
            x = x + h
        return x


class Encoder(nn.Module):
    """The stack of transformer layers."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"]
    ) -> list[Float[Array, "batch tokens channels"]]:
        """Returns the hidden states [B, N, C]: the input, then the output of each layer."""
        states = [x]
        for i in range(self.config.num_layers):
            states.append(Layer(self.config, self.dtype, name=f"layer_{i}")(states[-1]))
        return states


class DINO(nn.Module):
    """The vision transformer of DINO or DINOv2.

    Attributes:
      config: sizes.
      dtype: type of the computation.
    """

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], *, capture: Sequence[int] = ()
    ) -> DINOOutput:
        """Encodes images.

        Args:
          images: [B, H, W, 3], normalised as in training (with ImageNet's mean and standard
            deviation). Pixels beyond the last whole patch, at the bottom and the right, are
            ignored.
          capture: indices of the layers whose hidden states are returned too, as in transformers'
            `hidden_states`: 0 is the embeddings, `num_layers` the last layer.

        Raises:
          ValueError: an index in `capture` is not in [0, num_layers].
        """
        unknown = set(capture) - set(range(self.config.num_layers + 1))
        if unknown:
            raise ValueError(
                f"cannot capture {sorted(unknown)}; known: 0 to {self.config.num_layers}"
            )
        x = Embeddings(self.config, self.dtype, name="embeddings")(images)
        states = Encoder(self.config, self.dtype, name="encoder")(x)
        last = layers.LayerNorm(self.config.epsilon, self.dtype, name="layernorm")(states[-1])
        return DINOOutput(last, last[:, 0], {layer: states[layer] for layer in capture})
