import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.models import convolution, platforms


@pytest.mark.parametrize(
    "size, padding", [(3, ((1, 1), (1, 1))), (3, ((0, 1), (2, 0))), (5, ((2, 2), (0, 4)))]
)
def test_the_formulation_for_tpus_equals_convolution(size, padding):
    """Forward and both gradients, on an image that is not square."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(2, 5, 7, 32)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 32, 48)), jnp.float32)
    expected, back = jax.vjp(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        kernel,
    )
    outer = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    with platforms.target_platform(platforms.Target("tpu")):
        result, ours = jax.vjp(
            lambda x, kernel: convolution.conv2d(x, kernel, padding=padding), x, kernel
        )
    for mine, plain in zip((result, *ours(outer)), (expected, *back(outer)), strict=True):
        assert mine.shape == plain.shape
        assert np.linalg.norm(mine - plain) < 1e-6 * np.linalg.norm(plain)


def test_a_sum_of_taps_is_rounded_once():
    """Products of bfloat16 are summed in float32."""
    rng = np.random.default_rng(8)
    x, kernel = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((1, 6, 6, 32), (3, 3, 32, 32))
    )
    padding = ((1, 1), (1, 1))
    for function in (
        lambda x, kernel: convolution.by_taps(x, kernel, padding),
        lambda x, kernel: convolution.input_gradient_by_taps(kernel, x, padding),
    ):
        exact = function(*(array.astype(jnp.float32) for array in (x, kernel)))
        ours = function(x, kernel)
        assert ours.dtype == jnp.bfloat16
        once = exact.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.linalg.norm(ours - exact) < 1.01 * np.linalg.norm(once - exact)


@pytest.mark.parametrize("pictures", [4, 5])
def test_gradients_are_those_of_a_convolution(pictures):
    """Tap by tap for few images, by XLA's own gradient for more."""
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(pictures, 5, 7, 32)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 32, 48)), jnp.float32)
    padding = ((1, 1), (0, 2))
    expected, back = jax.vjp(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        kernel,
    )
    outer = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    result, ours = jax.vjp(
        lambda x, kernel: convolution.conv2d(x, kernel, padding=padding), x, kernel
    )
    text = jax.jit(lambda *a: ours(*a)).lower(outer).as_text()
    assert ("stablehlo.concatenate" in text) == (pictures == 4)
    for mine, plain in zip((result, *ours(outer)), (expected, *back(outer)), strict=True):
        assert np.linalg.norm(mine - plain) < 1e-6 * np.linalg.norm(plain)


@pytest.mark.parametrize("side, taken", [(128, True), (129, False)])
def test_a_tpu_sums_taps_of_small_maps(side, taken):
    x, kernel = np.zeros((1, side, side, 32), np.float32), np.zeros((3, 3, 32, 32), np.float32)

    def lowered(platform):
        with platforms.target_platform(platforms.Target(platform)):
            return (
                jax.jit(
                    lambda x, kernel: jax.grad(lambda x: convolution.conv2d(x, kernel).sum())(x)
                )
                .trace(x, kernel)
                .lower()
                .as_text()
            )

    assert ("stablehlo.convolution" in lowered("tpu")) != taken
    assert "stablehlo.convolution" in lowered("gpu")
