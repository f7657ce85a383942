"""Shapes and types are checked at the signatures of focus/ and diffusion/ while tests run (tests/conftest.py)."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import focusdpo_jax as fd

MAPS = jnp.ones((2, 4, 4))


def test_a_wrong_shape_fails_at_the_signature():
    """[2, 4, 4] against [2, 4] or [2, 4, 5] would broadcast or fail somewhere inside."""
    assert fd.focus.weighted_mean(MAPS, MAPS).shape == (2,)
    for values in (jnp.ones((1, 4, 4)), jnp.ones((2, 4, 5)), jnp.ones((4, 4)), MAPS.astype(int)):
        with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'values'"):
            fd.focus.weighted_mean(MAPS, values)


def test_a_wrong_shape_fails_while_it_is_traced():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'values'"):
        jax.jit(fd.focus.weighted_mean)(MAPS, jnp.ones((2, 4, 5)))


def test_signatures_of_diffusion_are_checked_too():
    schedule = fd.diffusion.scaled_linear_schedule()
    latents = jnp.ones((2, 4, 4, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 't'"):
        schedule.add_noise(latents, latents, jnp.array([1, 2, 3]))
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 't'"):
        schedule.add_noise(latents, latents, jnp.array([1.0, 2.0]))
