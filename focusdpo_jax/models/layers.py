"""Layers shared by the UNet, the autoencoder, CLIP, DINO and the subject adapter.

Modules are named after the tensors of the published PyTorch checkpoints (diffusers,
transformers), with `.N` written `_N`, so that the map between the two is a rule and not a table.
Parameters are created in float32; `dtype` is the type of the computation.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models import normalisation, platforms
from focusdpo_jax.models.attention import attend
from focusdpo_jax.models.bias import add_bias
from focusdpo_jax.models.convolution import conv2d
from focusdpo_jax.models.lora import LoRADense


def gelu(x):
    """The exact GELU, x / 2 (1 + erf(x / sqrt(2))), as PyTorch writes it.

    It is taken in float32. `jax.nn.gelu` writes it with erfc, which takes a CPU twice as long, and
    is more exact only where the result is below 1e-6.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x):
    """The standard normal distribution's probability of less than float32 x."""
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5))))


ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": gelu,
}
ZEROS = nn.initializers.zeros
# The parameter of PyTorch's cubic kernel.
CUBIC = -0.75


class Conv(nn.Module):
    """Convolution over [B, H, W, C], with a kernel [k, k, C, features].

    `padding` is ((top, bottom), (left, right)); left out, it is k // 2 on every side.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to [B, H', W', features]."""
        size = self.kernel_size
        padding = self.padding or ((size // 2, size // 2),) * 2
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
    """Group normalisation over the last axis; mean and variance are taken in float32.

    `activation` is applied to the result, as one with it.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    activation: Any = None

    @nn.compact
    def __call__(self, x):
        """Maps [B, ..., C] to the same shape; C is a multiple of `groups`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", ZEROS, (x.shape[-1],))
        return normalisation.group_norm(
            x, scale, bias, self.groups, self.epsilon, self.dtype, self.activation
        )


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; mean and variance are taken in float32."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [..., C] to the same shape."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", ZEROS, (x.shape[-1],))
        return normalisation.layer_norm(x, scale, bias, self.epsilon, self.dtype)


def sinusoidal_embedding(values, width):
    """Cosines, then sines, of `values` at `width // 2` frequencies from 1 down towards 1/10000.

    This is the embedding of SDXL's timesteps and time ids (in diffusers: flip_sin_to_cos=True,
    downscale_freq_shift=0).

    Args:
      values: [B], any real numbers.
      width: even number of features.

    Returns:
      [B, width] in float32.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = values.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def bicubic_weights(size, new_size):
    """Weights that interpolate `size` samples at `new_size` places, as PyTorch's bicubic mode does.

    Cubic convolution (Keys 1981) with the parameter -0.75 over half-pixel centres, samples outside
    repeating the border, and no antialiasing: `torch.nn.functional.interpolate(mode="bicubic",
    align_corners=False)`. (`jax.image.resize` takes -0.5, and renormalises at the border.)

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
    """Attention of tokens to themselves or to a context, with its four projections.

    Attributes:
      num_heads: number of heads.
      width: width of queries, keys and values over all heads; the input's width if None.
      input_bias: whether the query, key and value projections have a bias.
      output_bias: whether the output projection has a bias.
    """

    num_heads: int
    width: int | None = None
    input_bias: bool = False
    output_bias: bool = True
    lora_rank: int = 0
    lora_alpha: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, context=None):
        """Maps tokens [B, Q, C] and a context [B, K, D] (the tokens if None) to [B, Q, C]."""
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
    """Two normalised convolutions around an optional timestep embedding, with a shortcut.

    The second convolution starts at zero, so that a fresh block is its shortcut: a deep network
    then trains from the first step (arXiv 2105.05233).
    """

    features: int
    norm_groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, embedding=None):
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
    """Halves height and width (rounding up) by a convolution of stride 2.

    SDXL's UNet pads by one on every side, its autoencoder only below and on the right.
    """

    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to [B, ~H / 2, ~W / 2, C]."""
        return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then convolves."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, size=None):
        """Maps [B, H, W, C] to [B, 2 H, 2 W, C], cropped to `size` (height, width) if given."""
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return Conv(channels, dtype=self.dtype, name="conv")(x)


class GEGLU(nn.Module):
    """The dense layer before a gate (arXiv 2002.05202): what will be gated, and the gate."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [..., C] to what `_gated` takes: [..., 2 features], on a CPU two of [..., features]."""
        if platforms.current().platform == "cpu":
            return _Halves(self.features, self.dtype, name="proj")(x)
        return LoRADense(2 * self.features, dtype=self.dtype, name="proj")(x)


class _Halves(nn.Module):
    """A dense layer as two products, with the bias as one more row of the kernel.

    In a loop over layers the bias is a slice of all layers', which XLA's CPU backend takes within the
    gate; that then takes ten times as long (measured). On halves of one array the backward pass is
    slower too. Together they are a fifth of a feed-forward's time.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [..., C] to two of [..., features]."""
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], 2 * self.features)
        )
        bias = self.param("bias", ZEROS, (2 * self.features,))
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1, dtype=self.dtype)
        kernel = jnp.concatenate([kernel, bias[None]], dtype=self.dtype)
        return tuple(x @ half for half in jnp.split(kernel, 2, axis=-1))


def _gated(x):
    """Gates what `GEGLU` returned, to [..., features]."""
    return _gate(*(x if isinstance(x, tuple) else jnp.split(x, 2, axis=-1)))


@jax.custom_vjp
def _gate(x, gate):
    """x times the GELU of gate, elementwise."""
    return x * gelu(gate)


def _gate_gradients(inputs, gradient):
    """Both gradients from one evaluation of the error function.

    Left to itself, XLA's TPU backend writes the gradient of the activation between two passes.
    """
    x, gate, gradient = (array.astype(jnp.float32) for array in (*inputs, gradient))
    below = _normal_cdf(gate)
    density = jnp.exp(-0.5 * jnp.square(gate)) * np.float32(1 / np.sqrt(2 * np.pi))
    return (
        (gradient * gate * below).astype(inputs[0].dtype),
        (gradient * x * (below + gate * density)).astype(inputs[1].dtype),
    )


_gate.defvjp(lambda x, gate: (_gate(x, gate), (x, gate)), _gate_gradients)


class GELU(nn.Module):
    """A dense layer without bias, followed by the exact GELU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [..., C] to [..., features]."""
        x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="proj")(x)
        return gelu(x)


class FeedForward(nn.Module):
    """Widens tokens `expansion` times, activates and returns them to their width.

    `gated` takes GEGLU and biases (the UNet's transformer blocks); otherwise GELU and none (the
    resampler's).
    """

    expansion: int = 4
    gated: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [..., C] to the same shape."""
        first = GEGLU if self.gated else GELU
        h = first(self.expansion * x.shape[-1], self.dtype, name="net_0")(x)
        last = LoRADense(x.shape[-1], self.gated, dtype=self.dtype, name="net_2")
        if not self.gated:
            return last(h)
        # Only what is not gated yet is kept for the backward pass: the rest is half as much again.
        return nn.remat(lambda last, h: last(_gated(h)))(last, h)


class MLP(nn.Module):
    """The feed-forward of a layer of CLIP or DINO; `activation` is a name in ACTIVATIONS."""

    intermediate_size: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps [..., C] to the same shape."""
        h = nn.Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](h))
