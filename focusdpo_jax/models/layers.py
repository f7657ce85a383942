"""Layers shared by the UNet, the autoencoder, CLIP, DINO and the subject adapter.

Submodules are named after the tensors of the published PyTorch checkpoints (diffusers,
transformers), with `.N` written `_N`, so that one rule maps between the two
(`checkpoints/pytorch_names`). Parameters are created in float32; `dtype` is the type of the
computation.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from focusdpo_jax.models import normalisation, platforms
from focusdpo_jax.models.attention import attend
from focusdpo_jax.models.bias import add_bias
from focusdpo_jax.models.convolution import conv2d
from focusdpo_jax.models.lora import LoRADense


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the exact GELU, x / 2 (1 + erf(x / sqrt(2))), in float32 as PyTorch does.

    `jax.nn.gelu` uses erfc, which takes a CPU twice as long and is more accurate only where the
    result is below 1e-6.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    """The cumulative distribution function of the standard normal distribution, of float32 x."""
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": gelu,
}
ZEROS = nn.initializers.zeros
# The parameter a of PyTorch's cubic convolution kernel (Keys 1981).
CUBIC = -0.75


class Conv(nn.Module):
    """Convolution over [B, H, W, C], with a square kernel [k, k, C, features].

    Attributes:
      features: output channels.
      kernel_size: k.
      stride: step in both directions.
      padding: ((top, bottom), (left, right)) zeros; None is k // 2 on every side.
      use_bias: whether to add a bias.
      kernel_init: initialiser of the kernel.
      dtype: type of the computation.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width features"]:
        """Maps [B, H, W, C] to [B, H', W', features]."""
        size = self.kernel_size
        half = size // 2
        padding = self.padding or ((half, half), (half, half))
        shape = (size, size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv2d(
            x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride, padding=padding
        )
        if self.use_bias:
            bias = self.param("bias", ZEROS, (self.features,))
            y = add_bias(y, bias.astype(self.dtype))
        return y


class GroupNorm(nn.Module):
    """Group normalisation over the last axis; mean and variance are computed in float32.

    Attributes:
      groups: number of groups.
      epsilon: added to the variance.
      dtype: type of the result.
      activation: elementwise function, fused with the normalisation and its backward pass.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    activation: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *positions channels"]
    ) -> Float[Array, "batch *positions channels"]:
        """Maps [B, ..., C] to the same shape; C is a multiple of `groups`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", ZEROS, (x.shape[-1],))
        return normalisation.group_norm(
            x, scale, bias, self.groups, self.epsilon, self.dtype, self.activation
        )


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; mean and variance are computed in float32.

    Attributes:
      epsilon: added to the variance.
      dtype: type of the result.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Maps [..., C] to the same shape."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", ZEROS, (x.shape[-1],))
        return normalisation.layer_norm(x, scale, bias, self.epsilon, self.dtype)


def sinusoidal_embedding(values: Array, width: int) -> Float[Array, "batch {width}"]:
    """Computes the sinusoidal embedding of SDXL's timesteps and time ids.

    It is diffusers' `get_timestep_embedding` with flip_sin_to_cos=True, downscale_freq_shift=0.

    Args:
      values: [B], integers or floats.
      width: number of features; even.

    Returns:
      [B, width] in float32: cosines, then sines, at `width // 2` frequencies from 1 down to almost
      1/10000.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = values.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def bicubic_weights(size: int, new_size: int) -> Float[np.ndarray, "{new_size} {size}"]:
    """Computes the matrix that resizes `size` samples to `new_size`, as PyTorch's bicubic mode.

    This is cubic convolution (Keys 1981) with a = -0.75 at half-pixel centres, with the border
    sample repeated outside and without antialiasing: `torch.nn.functional.interpolate(
    mode="bicubic", align_corners=False)`. (`jax.image.resize` uses a = -0.5 and renormalises at the
    border.)

    Returns:
      float32 numpy [new_size, size], whose rows sum to 1.
    """
    rows = np.arange(new_size)
    centres = (rows + 0.5) * size / new_size - 0.5
    before = np.floor(centres).astype(int)
    weights = np.zeros((new_size, size))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(before + tap - centres)
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        weights[rows, np.clip(before + tap, 0, size - 1)] += np.where(distance <= 1, near, far)
    return weights.astype(np.float32)


class Attention(nn.Module):
    """Multi-head self- or cross-attention with its four projections (diffusers' `Attention`).

    Attributes:
      num_heads: number of heads.
      width: channels of queries, keys and values over all heads; the input's if None.
      input_bias: whether the query, key and value projections have a bias.
      output_bias: whether the output projection has a bias.
      lora_rank, lora_alpha: low-rank updates of the projections; see `LoRADense`.
      dtype: type of the computation.
    """

    num_heads: int
    width: int | None = None
    input_bias: bool = False
    output_bias: bool = True
    lora_rank: int = 0
    lora_alpha: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Float[Array, "batch keys context_channels"] | None = None,
    ) -> Float[Array, "batch queries channels"]:
        """Attends from tokens [B, Q, C] to a context [B, K, D], by default to the tokens."""
        context = x if context is None else context
        width = self.width or x.shape[-1]

        def dense(features, use_bias, name):
            return LoRADense(
                features, use_bias, self.lora_rank, self.lora_alpha, dtype=self.dtype, name=name
            )

        query = dense(width, self.input_bias, "to_q")(x)
        key = dense(width, self.input_bias, "to_k")(context)
        value = dense(width, self.input_bias, "to_v")(context)
        out = attend(query, key, value, self.num_heads)
        return dense(x.shape[-1], self.output_bias, "to_out_0")(out)


class ResnetBlock(nn.Module):
    """Two normalised convolutions with an optional timestep embedding and a shortcut.

    The layout is that of diffusers' `ResnetBlock2D`. The second convolution is initialised to zero,
    so that a new block computes its shortcut alone and deep networks train from the first step
    (arXiv 2105.05233).

    Attributes:
      features: output channels.
      norm_groups, epsilon: groups and epsilon of both group normalisations.
      dtype: type of the computation.
    """

    features: int
    norm_groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        embedding: Float[Array, "batch embedding"] | None = None,
    ) -> Float[Array, "batch height width features"]:
        """Maps [B, H, W, C] and an embedding [B, E] to [B, H, W, features]."""
        h = GroupNorm(self.norm_groups, self.epsilon, self.dtype, nn.silu, name="norm1")(x)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        if embedding is not None:
            shift = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(
                nn.silu(embedding)
            )
            h = h + shift[:, None, None, :]
        h = GroupNorm(self.norm_groups, self.epsilon, self.dtype, nn.silu, name="norm2")(h)
        h = Conv(self.features, kernel_init=ZEROS, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """Halves height and width (rounding up) with a convolution of stride 2.

    SDXL's UNet pads by one on every side, its autoencoder only at the bottom and the right.

    Attributes:
      padding: see `Conv`.
      dtype: type of the computation.
    """

    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Maps [B, H, W, C] to [B, ~H / 2, ~W / 2, C]."""
        return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour interpolation, then convolves."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Maps [B, H, W, C] to [B, 2 H, 2 W, C], cropped to `size` (height, width) if given."""
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return Conv(channels, dtype=self.dtype, name="conv")(x)


# Values and gates of GEGLU: concatenated [..., 2 features], or as two arrays [..., features].
_ValuesAndGates = (
    Float[Array, "*batch both"] | tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]
)


class GEGLU(nn.Module):
    """The dense layer of a GEGLU (arXiv 2002.05202), before the gate is applied (`_apply_gate`).

    Attributes:
      features: channels of the values, and of the gates.
      dtype: type of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> _ValuesAndGates:
        """Maps [..., C] to [..., 2 features] or, on a CPU, to two arrays [..., features]."""
        if platforms.current().platform == "cpu":
            return _SplitDense(self.features, self.dtype, name="proj")(x)
        return LoRADense(2 * self.features, dtype=self.dtype, name="proj")(x)


class _SplitDense(nn.Module):
    """A dense layer as two matrix products, with the bias as an additional row of the kernel.

    It has the parameters of one `nn.Dense` with 2 `features`, and is faster on CPUs. In a loop over
    layers the bias is a slice of a stacked array. XLA's CPU backend fuses this slice into the gate,
    which then takes ten times as long (measured). The backward pass is slower with two halves of
    one array, too. Together they are a fifth of a feed-forward's time.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch channels"]
    ) -> tuple[Float[Array, "*batch features"], Float[Array, "*batch features"]]:
        """Maps [..., C] to two arrays [..., features]."""
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], 2 * self.features)
        )
        bias = self.param("bias", ZEROS, (2 * self.features,))
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1, dtype=self.dtype)
        kernel = jnp.concatenate([kernel, bias[None]], dtype=self.dtype)
        values, gates = jnp.split(kernel, 2, axis=-1)
        return x @ values, x @ gates


def _apply_gate(x: _ValuesAndGates) -> Float[Array, "*batch features"]:
    """Multiplies the values of `GEGLU` with the GELU of its gates."""
    values, gates = x if isinstance(x, tuple) else jnp.split(x, 2, axis=-1)
    return _gate(values, gates)


@jax.custom_vjp
def _gate(x: Array, gate: Array) -> Array:
    return x * gelu(gate)


def _gate_gradients(inputs, gradient):
    """Both gradients of `_gate` from one evaluation of the error function.

    By default XLA's TPU backend uses two passes and writes the gradient of the activation to memory
    between them.
    """
    x, gate, gradient = (array.astype(jnp.float32) for array in (*inputs, gradient))
    cdf = _normal_cdf(gate)
    density = jnp.exp(-0.5 * jnp.square(gate)) * np.float32(1 / np.sqrt(2 * np.pi))
    return (
        (gradient * gate * cdf).astype(inputs[0].dtype),
        (gradient * x * (cdf + gate * density)).astype(inputs[1].dtype),
    )


_gate.defvjp(lambda x, gate: (_gate(x, gate), (x, gate)), _gate_gradients)


class GELU(nn.Module):
    """A dense layer without bias, followed by the exact GELU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch features"]:
        """Maps [..., C] to [..., features]."""
        x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="proj")(x)
        return gelu(x)


class FeedForward(nn.Module):
    """The two-layer feed-forward of a transformer block.

    Attributes:
      expansion: hidden channels, as a multiple of the input's.
      gated: use GEGLU and biases (the UNet's transformer blocks), or GELU without biases (the
        resampler).
      dtype: type of the computation.
    """

    expansion: int = 4
    gated: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Maps [..., C] to the same shape."""
        width = self.expansion * x.shape[-1]
        last = LoRADense(x.shape[-1], self.gated, dtype=self.dtype, name="net_2")
        if not self.gated:
            return last(GELU(width, self.dtype, name="net_0")(x))
        h = GEGLU(width, self.dtype, name="net_0")(x)
        # Save only the input of the gate for the backward pass; its output would add half as much.
        return nn.remat(lambda last, h: last(_apply_gate(h)))(last, h)


class MLP(nn.Module):
    """The feed-forward of a layer of CLIP or DINO.

    Attributes:
      intermediate_size: hidden channels.
      activation: a key of `ACTIVATIONS`.
      dtype: type of the computation.
    """

    intermediate_size: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Maps [..., C] to the same shape."""
        h = nn.Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](h))
