import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.models import convolution


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
            convolution.input_gradient_by_patches(x, kernel, outer, padding=padding),
            convolution.kernel_gradient_by_patches(x, kernel, outer, padding=padding))
    for mine, plain in zip(ours, (expected, *back(outer)), strict=True):
        assert mine.shape == plain.shape
        assert np.linalg.norm(mine - plain) < 1e-6 * np.linalg.norm(plain)


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
    traced = jax.jit(lambda x, kernel: jax.grad(
        lambda *both: convolution.conv2d(*both).sum(), argnums=(0, 1))(x, kernel)).trace(x, kernel)
    assert ("stablehlo.convolution" in traced.lower(
        lowering_platforms=("tpu",)).as_text()) != taken
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("cuda",)).as_text()
