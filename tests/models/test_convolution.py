import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.models import convolution, platforms


@pytest.mark.parametrize("size, padding", [(3, ((1, 1), (1, 1))), (3, ((0, 1), (2, 0))),
                                           (1, ((0, 0), (0, 0)))])
def test_by_patches_is_convolution(size, padding):
    """The TPU's form, forward and both gradients, on a picture that is not square."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(2, 5, 7, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 6, 4)), jnp.float32)
    expected, back = jax.vjp(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")), x, kernel)
    outer = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    ours = (convolution.by_patches(x, kernel, padding),
            convolution.input_gradient_by_patches(x, kernel, outer, padding),
            convolution.kernel_gradient_by_patches(x, kernel, outer, padding))
    for mine, plain in zip(ours, (expected, *back(outer)), strict=True):
        assert mine.shape == plain.shape
        assert np.linalg.norm(mine - plain) < 1e-6 * np.linalg.norm(plain)


def test_gradient_by_patches_is_rounded_little_more_than_once():
    """In bfloat16 each tap's share is rounded, their sum once more."""
    rng = np.random.default_rng(8)
    x, outer = (jnp.asarray(rng.normal(size=(1, 6, 6, 32)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 32, 32)), jnp.bfloat16)

    def gradient(*arrays):
        return convolution.input_gradient_by_patches(*arrays, ((1, 1), (1, 1))).astype(jnp.float32)

    exact = gradient(*(array.astype(jnp.float32) for array in (x, kernel, outer)))
    once = exact.astype(jnp.bfloat16).astype(jnp.float32)
    error = np.linalg.norm(gradient(x, kernel, outer) - exact)
    assert error < 1.6 * np.linalg.norm(once - exact)


@pytest.mark.parametrize("pictures", [4, 5])
def test_gradients_are_those_of_a_convolution(pictures):
    """Of few pictures tap by tap, of more as XLA has it."""
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(pictures, 5, 7, 32)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 32, 48)), jnp.float32)
    padding = ((1, 1), (0, 2))
    expected, back = jax.vjp(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")), x, kernel)
    outer = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    result, ours = jax.vjp(
        lambda x, kernel: convolution.conv2d(x, kernel, padding=padding), x, kernel)
    text = jax.jit(lambda *a: ours(*a)).lower(outer).as_text()
    assert ("stablehlo.concatenate" in text) == (pictures == 4)
    for mine, plain in zip((result, *ours(outer)), (expected, *back(outer)), strict=True):
        assert np.linalg.norm(mine - plain) < 1e-6 * np.linalg.norm(plain)


@pytest.mark.parametrize("side, taken", [(32, True), (33, False)])
def test_a_tpu_takes_patches_of_coarse_maps_alone(side, taken):
    x, kernel = np.zeros((1, side, side, 32), np.float32), np.zeros((3, 3, 32, 32), np.float32)

    def lowered(platform):
        with platforms.compiled_for(platforms.Target(platform)):
            gradients = jax.jit(lambda x, kernel: jax.grad(
                lambda *both: convolution.conv2d(*both).sum(), argnums=(0, 1))(x, kernel))
            return gradients.trace(x, kernel).lower().as_text()

    assert ("stablehlo.convolution" in lowered("tpu")) != taken
    assert "stablehlo.convolution" in lowered("gpu")
