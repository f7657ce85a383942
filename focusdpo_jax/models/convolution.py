"""Two-dimensional convolution, NHWC, in the form that suits each platform.

XLA's CPU backend runs a forward convolution, and the gradient of its input, near the speed of a
matrix product (as `compiling` asks it to), but expresses the gradient of the kernel as a convolution
that sums over pictures as if they were channels. Of few pictures, with stride one and 32 channels or
more, that gradient is here, for each of the kernel's taps, one matrix product of the shifted input with
the output's gradient; `benchmarks/convolutions.py` shows the ratios.

XLA's TPU backend spreads the positions of one or two feature maps over a larger batch, and pads and copies
them for it; by its own estimate that takes half of a convolution's time or more. There a convolution, and
the gradient of its input, is the sum of one matrix product for each tap, of shifted slices that are read in
place: about half of the estimated time at most of SDXL's sizes (`benchmarks/tpu_layers.py`).

Every other case and every other platform keeps XLA's own.
"""

import functools

import jax
import jax.numpy as jnp

from focusdpo_jax.models import platforms

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Below this many channels a tap's matrix product is too thin to pay for its copies (measured).
_MIN_CHANNELS = 32
# Up to so many pictures a CPU takes the gradient of the kernel tap by tap (measured).
_FEW_PICTURES = 4
# Up to so many positions of a picture a TPU adds up taps: the sum is in float32.
_MAX_POSITIONS = 128 * 128


def conv2d(x, kernel, *, stride=1, padding=((1, 1), (1, 1))):
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


def _convolve(x, kernel, padding, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT
    )


def _adds_taps(x, platform):
    return platform == "tpu" and x.shape[1] * x.shape[2] <= _MAX_POSITIONS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unit_stride(x, kernel, padding, platform):
    return (by_taps if _adds_taps(x, platform) else _convolve)(x, kernel, padding)


def _forward(x, kernel, padding, platform):
    return _unit_stride(x, kernel, padding, platform), (x, kernel)


def _backward(padding, platform, residuals, gradient):
    x, kernel = residuals
    _, back = jax.vjp(lambda *both: _convolve(*both, padding), x, kernel)
    input_gradient, kernel_gradient = back(gradient)
    if _adds_taps(x, platform):
        input_gradient = input_gradient_by_taps(kernel, gradient, padding)
    if platform == "cpu" and len(x) <= _FEW_PICTURES:
        kernel_gradient = _kernel_gradient_by_taps(x, kernel, gradient, padding)
    return input_gradient, kernel_gradient


_unit_stride.defvjp(_forward, _backward)


def _kernel_gradient_by_taps(x, kernel, gradient, padding):
    height, width = gradient.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    outer = gradient.reshape(-1, gradient.shape[-1]).T  # [Cout, B*H'*W']
    taps = [
        outer @ padded[:, i : i + height, j : j + width, :].reshape(-1, x.shape[-1])
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.stack(taps).swapaxes(1, 2).reshape(kernel.shape)


def by_taps(x, kernel, padding):
    """`conv2d` of stride 1: each tap's share of the output, added up in float32."""
    rows, columns = kernel.shape[:2]
    taps = [[kernel[i, j] for j in range(columns)] for i in range(rows)]
    return _sum_of_taps(x, taps, padding, "bhwc,co->bhwo")


def input_gradient_by_taps(kernel, gradient, padding):
    """The gradient of the input of `conv2d`: a convolution with the kernel turned around."""
    rows, columns = kernel.shape[:2]
    padding = tuple(
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip((rows, columns), padding, strict=True)
    )
    taps = [[kernel[i, j] for j in reversed(range(columns))] for i in reversed(range(rows))]
    return _sum_of_taps(gradient, taps, padding, "bhwo,co->bhwc")


def _sum_of_taps(x, taps, padding, product):
    """Sums `product` of the slice of x that each tap sees and the tap, a matrix [Cin, Cout]."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height = padded.shape[1] - len(taps) + 1
    width = padded.shape[2] - len(taps[0]) + 1
    shares = [
        jnp.einsum(
            product,
            padded[:, i : i + height, j : j + width],
            tap,
            preferred_element_type=jnp.float32,
        )
        for i, row in enumerate(taps)
        for j, tap in enumerate(row)
    ]
    return functools.reduce(jnp.add, shares).astype(x.dtype)
