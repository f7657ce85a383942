"""DINO's vision transformer (arXiv 2104.14294) and DINOv2's (arXiv 2304.07193).

The two differ in a learned scale on every branch, which DINOv2 has, and in the epsilon of their
norms. Modules are named after the tensors of transformers' Dinov2Model; `checkpoints/dino.py`
reads the published files of both.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import layers
from focusdpo_jax.models.attention import attend


@dataclasses.dataclass(frozen=True)
class DINOConfig:
    """Sizes of a vision transformer; the defaults are those of DINO ViT-S/16.

    Attributes:
      image_size: side of the square that the stored positions cover, in pixels. Images of other
        sizes get interpolated positions.
      patch_size: side of a patch, in pixels.
      hidden_size, num_layers, num_heads, intermediate_size: of the transformer.
      epsilon: of every norm.
      layer_scale: whether each branch is scaled per channel before it is added (DINOv2).
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
    def grid_size(self):
        """Patches on a side of the stored positions."""
        return self.image_size // self.patch_size


class DINOOutput(NamedTuple):
    """What the transformer gives.

    Attributes:
      last: [B, 1 + N, C], normalised states after the last layer: the class token, then the patches
        row by row.
      pooled: [B, C], the class token of `last`.
      captured: dict from the number of a layer to its states [B, 1 + N, C], not normalised.
    """

    last: Any
    pooled: Any
    captured: Any


def interpolate_positions(positions, grid):
    """Position embeddings for another grid of patches, as transformers interpolates them.

    Args:
      positions: [1, 1 + S * S, C], of the class token and of a square of patches.
      grid: (rows, columns) of the patches wanted.

    Returns:
      [1, 1 + rows * columns, C] in float32.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    positions = positions.astype(jnp.float32)
    if grid == (side, side):
        return positions
    square = positions[0, 1:].reshape(side, side, -1)
    down, across = (layers.bicubic_weights(side, new) for new in grid)
    patches = jnp.einsum(
        "ri,cj,ijd->rcd", down, across, square, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.concatenate([positions[:, :1], patches.reshape(1, -1, square.shape[-1])], axis=1)


class PatchEmbeddings(nn.Module):
    """A linear map of each patch."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
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
    """Patches, a class token and their positions."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Maps [B, H, W, 3] to [B, 1 + N, C]."""
        config = self.config
        patches = PatchEmbeddings(config, self.dtype, name="patch_embeddings")(images)
        batch, *grid, channels = patches.shape
        table = nn.initializers.normal(0.02)
        first = self.param("cls_token", table, (1, 1, channels)).astype(self.dtype)
        first = jnp.broadcast_to(first, (batch, 1, channels))
        positions = self.param("position_embeddings", table, (1, 1 + config.grid_size**2, channels))
        positions = interpolate_positions(positions, tuple(grid)).astype(self.dtype)
        return jnp.concatenate([first, patches.reshape(batch, -1, channels)], axis=1) + positions


class SelfAttention(nn.Module):
    """Multi-head self-attention up to its output projection."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, N, C] to the same shape."""
        query, key, value = (
            nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        return attend(query, key, value, self.num_heads)


class AttentionOutput(nn.Module):
    """The output projection, which the files keep in a module of its own."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, N, C] to the same shape."""
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, N, C] to the same shape."""
        h = SelfAttention(self.num_heads, self.dtype, name="attention")(x)
        return AttentionOutput(self.dtype, name="output")(h)


class LayerScale(nn.Module):
    """A factor for each channel (arXiv 2103.17239)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, N, C] to the same shape."""
        return x * self.param("lambda1", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before, scaled (DINOv2) and added after."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
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
    """The layers of the transformer."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, N, C] to a list of such states: the input, then the output of each layer."""
        states = [x]
        for i in range(self.config.num_layers):
            states.append(Layer(self.config, self.dtype, name=f"layer_{i}")(states[-1]))
        return states


class DINO(nn.Module):
    """The vision transformer of DINO or DINOv2."""

    config: DINOConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, capture=()):
        """Maps images to a `DINOOutput`.

        Args:
          images: [B, H, W, 3], normalised as the network was trained (with ImageNet's mean and
            deviation). What H and W have beyond whole patches, below and on the right, is not seen.
          capture: numbers of the layers whose output is wanted too, as transformers counts
            `hidden_states`: 0 is the embeddings, `num_layers` the last layer.

        Raises:
          ValueError: a number in `capture` is no layer.
        """
        unknown = set(capture) - set(range(self.config.num_layers + 1))
        if unknown:
            raise ValueError(
                f"cannot capture {sorted(unknown)}; known: 0 to {self.config.num_layers}"
            )
        x = Embeddings(self.config, self.dtype, name="embeddings")(images)
        states = Encoder(self.config, self.dtype, name="encoder")(x)
        last = layers.LayerNorm(self.config.epsilon, self.dtype, name="layernorm")(states[-1])
        return DINOOutput(last, last[:, 0], {number: states[number] for number in capture})
