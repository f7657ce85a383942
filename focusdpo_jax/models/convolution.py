"""Two-dimensional convolution, NHWC, with a formulation per platform.

A "tap" is one position (i, j) of the kernel, a matrix [Cin, Cout].

CPU: with the options of `compiling`, XLA runs a forward convolution and the gradient of its input
near the speed of a matrix product. It expresses the gradient of the kernel as a convolution whose
channels are the images of the batch, which is slow for few images. For few images, stride one and
32 channels or more, the gradient is computed here as one matrix product per tap, of the shifted
input and the output's gradient. `benchmarks/convolutions.py` prints the ratios.

TPU: XLA spreads the positions of one or two feature maps over a larger batch, and pads and copies
them for it; by its own estimate this takes half of a convolution's time or more. Here a
convolution, and the gradient of its input, is the sum of one matrix product per tap, of shifted
slices that are read in place. It takes about half of the estimated time at most of SDXL's sizes
(`benchmarks/tpu_layers.py`).

Everything else uses XLA's convolution.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.models import platforms

# Zeros around the input: ((top, bottom), (left, right)).
Padding = tuple[tuple[int, int], tuple[int, int]]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Below this many channels a tap's matrix product is too thin to pay for its copies (measured).
_MIN_CHANNELS = 32
# Most images for which a CPU computes the gradient of the kernel tap by tap (measured).
_FEW_IMAGES = 4
# Most positions of an image for which a TPU sums over taps: the sum is in float32.
_MAX_POSITIONS = 128 * 128


def conv2d(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    *,
    stride: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
) -> Float[Array, "batch new_height new_width out_channels"]:
    """Convolves `x` [B, H, W, Cin] with `kernel` [kh, kw, Cin, Cout].

    Args:
      x: input, any float type.
      kernel: weights of the same type.
      stride: step in both directions.
      padding: ((top, bottom), (left, right)) zeros.

    Returns:
      [B, H', W', Cout] in the type of `x`.
    """
    if stride == 1 and min(kernel.shape[2:]) >= _MIN_CHANNELS and kernel.shape[0] > 1:
        return _unit_stride(x, kernel, padding, platforms.current().platform)
    return _convolve(x, kernel, padding, stride)


def _convolve(x: Array, kernel: Array, padding: Padding, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT
    )


def _sums_taps(x: Array, platform: str) -> bool:
    return platform == "tpu" and x.shape[1] * x.shape[2] <= _MAX_POSITIONS


def _unit_stride_primal(x: Array, kernel: Array, padding: Padding, platform: str) -> Array:
    return (by_taps if _sums_taps(x, platform) else _convolve)(x, kernel, padding)


_unit_stride = jax.custom_vjp(_unit_stride_primal, nondiff_argnums=(2, 3))


def _forward(x, kernel, padding, platform):
    return _unit_stride(x, kernel, padding, platform), (x, kernel)


def _backward(padding, platform, residuals, gradient):
    x, kernel = residuals
    _, back = jax.vjp(lambda x, kernel: _convolve(x, kernel, padding), x, kernel)
    input_gradient, kernel_gradient = back(gradient)
    if _sums_taps(x, platform):
        input_gradient = input_gradient_by_taps(kernel, gradient, padding)
    if platform == "cpu" and len(x) <= _FEW_IMAGES:
        kernel_gradient = _kernel_gradient_by_taps(x, kernel, gradient, padding)
    return input_gradient, kernel_gradient


_unit_stride.defvjp(_forward, _backward)


def _kernel_gradient_by_taps(x: Array, kernel: Array, gradient: Array, padding: Padding) -> Array:
    height, width = gradient.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    outer = gradient.reshape(-1, gradient.shape[-1]).T  # [Cout, B*H'*W']
    taps = [
        outer @ padded[:, i : i + height, j : j + width, :].reshape(-1, x.shape[-1])
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.stack(taps).swapaxes(1, 2).reshape(kernel.shape)


def by_taps(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    padding: Padding,
) -> Float[Array, "batch new_height new_width out_channels"]:
    """Computes `conv2d` with stride 1 as a sum over taps, in float32."""
    rows, columns = kernel.shape[:2]
    taps = [[kernel[i, j] for j in range(columns)] for i in range(rows)]
    return _sum_of_taps(x, taps, padding, "bhwc,co->bhwo")


def input_gradient_by_taps(
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    gradient: Float[Array, "batch height width out_channels"],
    padding: Padding,
) -> Float[Array, "batch new_height new_width in_channels"]:
    """Computes the gradient of `conv2d`'s input: a convolution with the flipped kernel.

    Args:
      kernel: kernel of `conv2d` with stride 1.
      gradient: gradient of its output.
      padding: padding of `conv2d`.
    """
    rows, columns = kernel.shape[:2]
    (top, bottom), (left, right) = padding
    full = (
        (rows - 1 - top, rows - 1 - bottom),
        (columns - 1 - left, columns - 1 - right),
    )
    taps = [[kernel[i, j] for j in reversed(range(columns))] for i in reversed(range(rows))]
    return _sum_of_taps(gradient, taps, full, "bhwo,co->bhwc")


def _sum_of_taps(x: Array, taps: list[list[Array]], padding: Padding, subscripts: str) -> Array:
    """Sums the einsums of each tap, a matrix [Cin, Cout], with the slice of x that it covers."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height = padded.shape[1] - len(taps) + 1
    width = padded.shape[2] - len(taps[0]) + 1
    terms = [
        jnp.einsum(
            subscripts,
            padded[:, i : i + height, j : j + width],
            tap,
            preferred_element_type=jnp.float32,
        )
        for i, row in enumerate(taps)
        for j, tap in enumerate(row)
    ]
    return functools.reduce(jnp.add, terms).astype(x.dtype)
