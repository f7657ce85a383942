"""MaPO's loss, by hand, and one step of a run with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from focusdpo_jax.objectives.mapo import mapo_loss
from focusdpo_jax.training import loop


def test_the_loss_of_two_pairs():
    chosen, rejected = np.array([0.2, 0.9]), np.array([0.3, 0.6])

    def odds(error):
        return 0.5 * error / (np.exp(0.5 * error) - 1)

    margin = 1000 * (odds(chosen) - odds(rejected))
    expected = chosen + 0.1 * np.log1p(np.exp(-margin))
    loss, diagnostics = mapo_loss(jnp.array(chosen), jnp.array(rejected), 0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_array_equal(diagnostics["implicit_accuracy"], [1, 0])


def test_the_gradient_lowers_the_chosen_error_and_raises_the_rejected():
    down, up = jax.grad(lambda w, r: mapo_loss(w, r, 0.1)[0], argnums=(0, 1))(0.5, 0.5)
    # Slope of x / (exp(x) - 1) at x = 0.25, times s T / 2 of the sigmoid, times beta.
    x = 0.25
    slope = (np.expm1(x) - x * np.exp(x)) / np.expm1(x) ** 2
    assert down == pytest.approx(1 - 0.1 * 500 * 0.5 * slope, rel=1e-3)
    assert up == pytest.approx(0.1 * 500 * 0.5 * slope, rel=1e-3)


def test_a_run(tiny_config, tmp_path):
    loop.run(tiny_config(objective="mapo", beta=0.1, steps=1, evaluation__pictures=0), tmp_path)
    assert np.isfinite(tiny.losses(tmp_path)[1])
