"""Two-dimensional convolution, NHWC, with a weight gradient that is fast on CPUs too.

XLA's CPU backend runs a forward convolution, and the gradient of its input, near the speed of a
matrix product, but expresses the gradient of the kernel as a convolution whose "kernel" is as
large as the picture, which it runs at less than half of that. For stride one and 32 channels or more that
gradient is, for each of the kernel's taps, one matrix product of the shifted input with the output's
gradient; `benchmarks/convolution_gradient.py` shows the ratio. Every other case and every
other platform keeps XLA's own gradient.
"""

import functools

import jax
import jax.numpy as jnp

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Below this many channels a tap's matrix product is too thin to pay for its copies (measured).
_MIN_CHANNELS = 32


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
        return _unit_stride(x, kernel, padding)
    return _convolve(x, kernel, stride, padding)


def _convolve(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unit_stride(x, kernel, padding):
    return _convolve(x, kernel, 1, padding)


def _forward(x, kernel, padding):
    return _convolve(x, kernel, 1, padding), (x, kernel)


def _backward(padding, residuals, gradient):
    x, kernel = residuals
    (input_gradient,) = jax.vjp(lambda v: _convolve(v, kernel, 1, padding), x)[1](gradient)
    kernel_gradient = jax.lax.platform_dependent(
        x, kernel, gradient,
        cpu=functools.partial(_kernel_gradient_by_taps, padding=padding),
        default=lambda x, kernel, gradient: jax.vjp(
            lambda k: _convolve(x, k, 1, padding), kernel)[1](gradient)[0])
    return input_gradient, kernel_gradient


_unit_stride.defvjp(_forward, _backward)


def _kernel_gradient_by_taps(x, kernel, gradient, *, padding):
    height, width = gradient.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    outer = gradient.reshape(-1, gradient.shape[-1]).T  # [Cout, B*H'*W']
    taps = [
        outer @ padded[:, i:i + height, j:j + width, :].reshape(-1, x.shape[-1])
        for i in range(kernel.shape[0]) for j in range(kernel.shape[1])
    ]
    return jnp.stack(taps).swapaxes(1, 2).reshape(kernel.shape)
