"""Two-dimensional convolution, NHWC, in the form that suits each platform.

XLA's CPU backend runs a forward convolution, and the gradient of its input, near the speed of a
matrix product (as `compiling` asks it to), but expresses the gradient of the kernel as a convolution
that sums over pictures as if they were channels. Of few pictures, with stride one and 32 channels or
more, that gradient is here, for each of the kernel's taps, one matrix product of the shifted input with
the output's gradient; `benchmarks/convolutions.py` shows the ratios.

XLA's TPU backend first spreads the few positions of a coarse feature map over a larger batch, whose
borders overlap: a fifth more operations at 32 x 32 positions, two fifths at 16 x 16, and a program that
takes several times as long to compile. There a convolution and both gradients are one matrix product
each of all positions' patches with the kernel, as a TPU's compiler takes it best
(`benchmarks/tpu_unet.py`; counted, not timed).

Every other case and every other platform keeps XLA's own.
"""

import functools

import jax
import jax.numpy as jnp

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Below this many channels a tap's matrix product is too thin to pay for its copies (measured).
_MIN_CHANNELS = 32
# Up to so many pictures a CPU takes the gradient of the kernel tap by tap (measured).
_FEW_PICTURES = 4
# Up to so many positions of a picture a TPU takes patches: they are nine times as large as the map.
_MAX_POSITIONS = 1024


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
    return jax.lax.platform_dependent(
        x, kernel, default=functools.partial(_convolve, stride=1, padding=padding),
        **_on_tpu(x, by_patches, padding))


def _on_tpu(x, function, padding):
    """The form for TPUs where there is one, as a keyword of `platform_dependent`."""
    suits = x.shape[1] * x.shape[2] <= _MAX_POSITIONS
    return {"tpu": functools.partial(function, padding=padding)} if suits else {}


def _forward(x, kernel, padding):
    return _unit_stride(x, kernel, padding), (x, kernel)


def _backward(padding, residuals, gradient):
    x, kernel = residuals
    input_gradient = jax.lax.platform_dependent(
        x, kernel, gradient,
        default=lambda x, kernel, gradient: jax.vjp(
            lambda v: _convolve(v, kernel, 1, padding), x)[1](gradient)[0],
        **_on_tpu(x, input_gradient_by_patches, padding))
    few = {"cpu": functools.partial(_kernel_gradient_by_taps, padding=padding)}
    kernel_gradient = jax.lax.platform_dependent(
        x, kernel, gradient, **(few if len(x) <= _FEW_PICTURES else {}),
        default=lambda x, kernel, gradient: jax.vjp(
            lambda k: _convolve(x, k, 1, padding), kernel)[1](gradient)[0],
        **_on_tpu(x, kernel_gradient_by_patches, padding))
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


def by_patches(x, kernel, padding):
    """`conv2d` of stride 1 as one matrix product."""
    return jnp.einsum("bhwp,po->bhwo", _patches(x, kernel, padding),
                      kernel.reshape(-1, kernel.shape[-1]))


def input_gradient_by_patches(x, kernel, gradient, *, padding):
    """The gradient of x: the output's gradient convolved with the kernel turned around."""
    del x
    rows, columns = kernel.shape[:2]
    (top, bottom), (left, right) = padding
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return by_patches(gradient, turned, ((rows - 1 - top, rows - 1 - bottom),
                                         (columns - 1 - left, columns - 1 - right)))


def kernel_gradient_by_patches(x, kernel, gradient, *, padding):
    """The gradient of the kernel: patches times the output's gradient, over all positions."""
    product = jnp.einsum("bhwp,bhwo->po", _patches(x, kernel, padding), gradient)
    return product.reshape(kernel.shape)


def _patches(x, kernel, padding):
    """What the kernel sees at each position: [B, H', W', kh * kw * Cin]."""
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    return jnp.concatenate([padded[:, i:i + height, j:j + width] for i in range(rows)
                            for j in range(columns)], axis=-1)
