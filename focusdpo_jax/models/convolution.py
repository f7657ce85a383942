"""Two-dimensional convolution, NHWC, in the form that suits each platform.

XLA's CPU backend runs a forward convolution, and the gradient of its input, near the speed of a
matrix product (as `compiling` asks it to), but expresses the gradient of the kernel as a convolution
that sums over pictures as if they were channels. Of few pictures, with stride one and 32 channels or
more, that gradient is here, for each of the kernel's taps, one matrix product of the shifted input with
the output's gradient; `benchmarks/convolutions.py` shows the ratios.

XLA's TPU backend first spreads the few positions of a coarse feature map over a larger batch, whose
borders overlap: a fifth more operations at 32 x 32 positions, two fifths at 16 x 16, and a program that
takes several times as long to compile. There a convolution and both gradients are one matrix product
each, of all positions' patches with the kernel or of their gradient with it, as a TPU's compiler takes
it best (`benchmarks/tpu_unet.py`; counted, not timed).

Every other case and every other platform keeps XLA's own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models import platforms

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
        return _unit_stride(x, kernel, padding, platforms.current().platform)
    return _convolve(x, kernel, padding, stride)


def _convolve(x, kernel, padding, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)


def _takes_patches(x, platform):
    return platform == "tpu" and x.shape[1] * x.shape[2] <= _MAX_POSITIONS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unit_stride(x, kernel, padding, platform):
    return (by_patches if _takes_patches(x, platform) else _convolve)(x, kernel, padding)


def _forward(x, kernel, padding, platform):
    return _unit_stride(x, kernel, padding, platform), (x, kernel)


def _backward(padding, platform, residuals, gradient):
    x, kernel = residuals
    if _takes_patches(x, platform):
        return (input_gradient_by_patches(x, kernel, gradient, padding),
                kernel_gradient_by_patches(x, kernel, gradient, padding))
    _, back = jax.vjp(lambda *both: _convolve(*both, padding), x, kernel)
    input_gradient, kernel_gradient = back(gradient)
    if platform == "cpu" and len(x) <= _FEW_PICTURES:
        kernel_gradient = _kernel_gradient_by_taps(x, kernel, gradient, padding)
    return input_gradient, kernel_gradient


_unit_stride.defvjp(_forward, _backward)


def _kernel_gradient_by_taps(x, kernel, gradient, padding):
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


def input_gradient_by_patches(x, kernel, gradient, padding):
    """The gradient of x: what each tap makes of the output's gradient, added where it was seen.

    No kernel is turned around for it: of a coarse map the kernel is what is large.
    """
    rows, columns, _, features = kernel.shape
    (top, bottom), (left, right) = padding
    shares = jnp.einsum("bhwo,po->bhwp", gradient, kernel.reshape(-1, features))
    shares = iter(jnp.split(shares, rows * columns, axis=-1))
    moved = [jax.lax.pad(next(shares).astype(jnp.float32), np.float32(0),
                         ((0, 0, 0), (i - top, rows - 1 - i - bottom, 0),
                          (j - left, columns - 1 - j - right, 0), (0, 0, 0)))
             for i in range(rows) for j in range(columns)]
    return functools.reduce(jnp.add, moved).astype(x.dtype)


def kernel_gradient_by_patches(x, kernel, gradient, padding):
    """The gradient of the kernel: patches times the output's gradient, over all positions."""
    # Not the patches of the forward pass, which are nine times what has to be kept.
    patches = _patches(jax.lax.optimization_barrier(x), kernel, padding)
    return jnp.einsum("bhwp,bhwo->po", patches, gradient).reshape(kernel.shape)


def _patches(x, kernel, padding):
    """What the kernel sees at each position: [B, H', W', kh * kw * Cin]."""
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    return jnp.concatenate([padded[:, i:i + height, j:j + width] for i in range(rows)
                            for j in range(columns)], axis=-1)
