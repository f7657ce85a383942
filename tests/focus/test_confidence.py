"""Confidence on maps computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.focus import confidence


def test_windows_are_cut_off_at_the_border():
    maps = jnp.zeros((1, 3, 4)).at[0, 0, 0].set(36.0)
    # The corner's window has four locations, those beside it six, the middle one nine.
    np.testing.assert_allclose(
        confidence.smoothed(maps), [[[9, 6, 0, 0], [6, 4, 0, 0], [0, 0, 0, 0]]], rtol=1e-6
    )


def test_uncertainty_is_relative_to_the_prior():
    error = jnp.full((1, 1, 9), 2.0).at[0, 0, 7:].set(50.0)
    prior = jnp.array([[[0, 1.0, 1, 0.5, 0, 0, 0, 0, 0]]])
    # The largest smoothed error inside is 2; what is larger lies outside and counts as 1.
    np.testing.assert_allclose(confidence.uncertainty(error, prior), np.ones((1, 1, 9)), rtol=1e-6)
    error = error.at[0, 0, 0].set(8.0)
    found = confidence.uncertainty(error, prior)
    np.testing.assert_allclose(found[0, 0, :5], [1, 1, 0.5, 0.5, 0.5], rtol=1e-6)


def test_uncertainty_is_scale_invariant_and_zero_without_errors_or_prior():
    draw = np.random.default_rng(0)
    error, prior = jnp.array(draw.random((2, 4, 4))), jnp.array(draw.random((2, 4, 4)))
    np.testing.assert_allclose(
        confidence.uncertainty(1e-3 * error, prior), confidence.uncertainty(error, prior), rtol=1e-5
    )
    assert not confidence.uncertainty(error, 0 * prior).any()
    assert not confidence.uncertainty(0 * error, prior).any()


def test_no_gradient():
    gradient = jax.grad(lambda x: confidence.uncertainty(x, jnp.ones((1, 2, 2))).sum())(
        jnp.ones((1, 2, 2))
    )
    assert not gradient.any()
