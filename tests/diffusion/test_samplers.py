"""The sampler against cases with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.diffusion import samplers
from focusdpo_jax.diffusion.schedule import NoiseSchedule, scaled_linear_schedule
from focusdpo_jax.errors import UserError


def test_timesteps_by_hand():
    assert samplers.sampling_timesteps(1000, 4).tolist() == [751, 501, 251, 1]
    assert samplers.sampling_timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert samplers.sampling_timesteps(1000, 3, "trailing").tolist() == [999, 666, 332]
    for spacing in ("leading", "trailing"):
        every = samplers.sampling_timesteps(1000, 999, spacing)
        assert every.max() <= 999 and np.all(np.diff(every) < 0)


@pytest.mark.parametrize("steps, spacing, message", [
    (0, "leading", "steps is 0"), (1000, "leading", "steps is 1000"), (4, "even", "'even'")])
def test_mistakes_are_named(steps, spacing, message):
    with pytest.raises(UserError, match=message):
        samplers.sampling_timesteps(1000, steps, spacing)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_an_oracle_for_one_image_leads_to_that_image(prediction_type, spacing):
    schedule = scaled_linear_schedule(prediction_type)
    image, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 4))

    def oracle(noisy, t):
        alpha, sigma = schedule.signal_and_noise(t)
        return schedule.target(image, (noisy - alpha * image) / sigma, t)

    out = jax.jit(lambda z: samplers.sample(oracle, schedule, z, 5, spacing))(noise)
    np.testing.assert_allclose(out, image, atol=1e-4)


def test_a_gaussian_comes_out_with_its_own_spread():
    """For data N(0, s^2) the best denoiser is linear, and DDIM must return variance s^2."""
    schedule, spread = scaled_linear_schedule(), 0.5

    def best(noisy, t):
        alpha, sigma = schedule.signal_and_noise(t)
        return noisy * sigma / (alpha**2 * spread**2 + sigma**2)

    out = samplers.sample(best, schedule, jnp.ones((1, 1, 1, 1)), 500)
    # Noise of size 1 at abar = 0.0047 stands for 0.996 of a standard deviation there.
    assert float(out[0, 0, 0, 0]) == pytest.approx(spread, rel=0.01)


def test_two_steps_by_hand():
    abar = np.full(10, 0.5, np.float32)
    abar[6], abar[1] = 0.36, 0.64
    schedule = NoiseSchedule(abar, "epsilon")
    seen = []

    def denoise(z, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t)
        return 0.5 * z

    out = samplers.sample(denoise, schedule, jnp.ones((2, 1, 1, 1)), 2)
    jax.effects_barrier()
    # t = 6: e = 0.5, x0 = (1 - 0.8 * 0.5) / 0.6 = 1, then 0.8 * 1 + 0.6 * 0.5 = 1.1
    # t = 1: e = 0.55, x0 = (1.1 - 0.6 * 0.55) / 0.8
    np.testing.assert_allclose(out[:, 0, 0, 0], [0.9625, 0.9625], rtol=1e-6)
    assert seen == [[6, 6], [1, 1]]


def test_guidance_is_one_call_with_the_conditional_half_first():
    calls = []

    def denoise(z, t):
        calls.append((z.shape, t.shape))
        condition = jnp.repeat(jnp.array([1.0, 10.0]), z.shape[0] // 2)
        return condition[:, None, None, None] * z

    z, t = jnp.full((3, 1, 1, 1), 2.0), jnp.zeros(3, int)
    # unconditional 20, conditional 2: 20 + 1.5 * (2 - 20)
    out = samplers.classifier_free_guidance(denoise, 1.5)(z, t)
    np.testing.assert_allclose(out[:, 0, 0, 0], [-7.0] * 3)
    assert calls == [((6, 1, 1, 1), (6,))]
    plain = samplers.classifier_free_guidance(denoise, 1.0)(z, t)
    np.testing.assert_allclose(plain, z)
