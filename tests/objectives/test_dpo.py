"""The options of the preference loss, on a single pair."""

import types

import jax.numpy as jnp
import numpy as np

from focusdpo_jax.focus import losses
from focusdpo_jax.objectives.base import ImageErrors
from focusdpo_jax.objectives.dpo import preference_loss

FIELDS = {
    "beta": 40.0,
    "anchor": 0.0,
    "anchor_fades": False,
    "preserve_winner": False,
    "match_beta": False,
    "loser_limit": 0.0,
}


def errors(seed, weights, prior):
    rng = np.random.default_rng(seed)
    reference = jnp.asarray(rng.uniform(0.4, 0.6, prior.shape), jnp.float32)
    policy = reference + jnp.asarray(rng.normal(0, 0.02, prior.shape), jnp.float32)
    return ImageErrors(policy, reference, weights, prior, policy[..., None])


def compute(weights, prior, **fields):
    config = types.SimpleNamespace(**FIELDS | fields)
    return preference_loss(errors(0, weights, prior), errors(1, weights, prior), config)


def test_a_matched_beta_is_that_of_diffusion_dpo():
    prior = jnp.zeros((1, 4, 4)).at[:, :2, :3].set(1)
    weights = 0.5 + prior
    scale = float(losses.relative_scale(weights, prior)[0])
    assert scale > 1.3
    loss, found = compute(weights, prior, match_beta=True)
    expected, plain = compute(weights, prior, beta=40.0 / scale)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(found["margin"], plain["margin"], rtol=1e-6)
    np.testing.assert_allclose(found["relative_scale"], [scale], rtol=1e-6)
    # With W = 1 nothing changes.
    ones = jnp.ones_like(prior)
    np.testing.assert_array_equal(compute(ones, prior, match_beta=True)[0], compute(ones, prior)[0])


def test_the_limit_of_the_loser_reaches_the_loss():
    """The rejected image's error rises by 0.05 of 0.5; at most a share of 0.5 counts."""
    prior = jnp.ones((1, 4, 4))
    reference = jnp.full_like(prior, 0.5)
    chosen = ImageErrors(reference, reference, prior, prior, prior[..., None])
    rejected = ImageErrors(reference + 0.05, reference, prior, prior, prior[..., None])
    for limit, counted in ((0.0, 0.05), (0.2, 0.05), (0.02, 0.01)):
        config = types.SimpleNamespace(**FIELDS | {"loser_limit": limit})
        loss, _ = preference_loss(chosen, rejected, config)
        np.testing.assert_allclose(loss, np.logaddexp(0, -20 * counted), rtol=1e-5)
