"""Norms and their gradients compared with flax's, which uses automatic differentiation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.models import bias, layers, platforms

RNG = np.random.default_rng(3)


def difference(ours, expected):
    """The largest relative distance of the leaves of two trees."""
    return max(
        np.linalg.norm(np.float32(a) - np.float32(b)) / np.linalg.norm(np.float32(b))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    )


def compared(ours, theirs, x, dtype):
    """Relative distance of the outputs, and of the gradients of x, scale and bias."""
    params = {
        "params": {
            "scale": jnp.asarray(RNG.normal(size=x.shape[-1]), jnp.float32),
            "bias": jnp.asarray(RNG.normal(size=x.shape[-1]), jnp.float32),
        }
    }
    outer = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)
    results = []
    for module, kind in ((ours, dtype), (theirs, jnp.float32)):
        out, back = jax.vjp(module, params, x.astype(kind))
        results.append((out, back(outer.astype(out.dtype))))
    (out, gradients), (expected, their_gradients) = results
    assert out.dtype == dtype
    return difference(out, expected), difference(gradients, their_gradients)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_layer_norm_equals_that_of_flax(dtype, tolerance, mean):
    x = jnp.asarray(mean + RNG.normal(size=(2, 7, 24)), dtype)
    out, gradients = compared(
        layers.LayerNorm(dtype=dtype).apply,
        nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply,
        x,
        dtype,
    )
    assert out < tolerance and gradients < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("activation", [None, nn.silu])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_group_norm_equals_that_of_flax(dtype, tolerance, activation, mean):
    """Over groups of two and three channels, on images that are not square."""
    x = jnp.asarray(mean + RNG.normal(size=(2, 3, 5, 12)), dtype)
    for groups in (4, 6):

        def theirs(params, x, groups=groups):
            out = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False).apply(params, x)
            return out if activation is None else activation(out)

        out, gradients = compared(
            layers.GroupNorm(groups, dtype=dtype, activation=activation).apply, theirs, x, dtype
        )
        assert out < tolerance and gradients < tolerance


def test_only_the_input_and_statistics_are_saved():
    """Except for the input, the residuals have one value per row or per channel."""
    x = jnp.ones((2, 8, 8, 32), jnp.bfloat16)
    for module in (
        layers.LayerNorm(dtype=jnp.bfloat16),
        layers.GroupNorm(8, dtype=jnp.bfloat16, activation=nn.silu),
    ):
        params = module.init(jax.random.key(0), x)
        _, back = jax.vjp(lambda x: module.apply(params, x), x)
        kept = [leaf for leaf in jax.tree.leaves(back) if leaf.size > 128]
        assert [leaf.dtype for leaf in kept if leaf.shape == x.shape] == [jnp.bfloat16]
        assert not [leaf for leaf in kept if leaf.shape != x.shape]


def test_the_gradient_of_a_bias_is_the_sum_of_rows():
    x, shift, outer = (
        jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)
        for shape in ((3, 40, 16), (16,), (3, 40, 16))
    )
    with platforms.target_platform(platforms.Target("tpu")):
        out, back = jax.vjp(bias.add_bias, x, shift)
        of_x, of_shift = back(outer)
        text = jax.jit(lambda outer: back(outer)).lower(outer).as_text()
    assert "dot_general" in text
    np.testing.assert_array_equal(out, x + shift)
    np.testing.assert_array_equal(of_x, outer)
    exact = np.float64(outer).sum((0, 1))
    assert np.all(np.abs(np.float64(of_shift) - exact) <= 2**-8 * np.abs(exact))


def test_a_gate_has_the_gradients_of_its_definition():
    x, gate, outer = (jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32) for _ in range(3))
    out, back = jax.vjp(layers._gate, x, gate)
    expected, plain = jax.vjp(lambda x, gate: x * jax.nn.gelu(gate, approximate=False), x, gate)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for ours, theirs in zip(back(outer), plain(outer), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
