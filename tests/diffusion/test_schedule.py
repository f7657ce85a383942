"""The schedule's published numbers, and that targets and their inverses agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.diffusion.schedule import (
    NoiseSchedule,
    logit_normal_timesteps,
    scaled_linear_schedule,
)
from focusdpo_jax.errors import UserError


def draws(shape=(3, 2, 2, 4)):
    latents, noise = jax.random.normal(jax.random.key(0), (2, *shape))
    return latents, noise


def test_sdxl_numbers():
    schedule = scaled_linear_schedule()
    assert schedule.timesteps == 1000
    # By hand: abar_0 = 1 - beta_start; the second beta lies 1 / 999 of the way between the roots.
    second = (np.sqrt(0.00085) + (np.sqrt(0.012) - np.sqrt(0.00085)) / 999) ** 2
    np.testing.assert_allclose(
        schedule.alphas_cumprod[:2], [0.99915, 0.99915 * (1 - second)], rtol=1e-7
    )
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.004660, abs=1e-6)  # sigma_max 14.61
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)


def test_add_noise_by_hand():
    schedule = NoiseSchedule(np.array([0.64, 0.36], np.float32), "epsilon")
    latents, noise = jnp.full((2, 1, 1, 1), 5.0), jnp.full((2, 1, 1, 1), 10.0)
    noisy = schedule.add_noise(latents, noise, jnp.array([0, 1]))
    np.testing.assert_allclose(noisy[:, 0, 0, 0], [0.8 * 5 + 0.6 * 10, 0.6 * 5 + 0.8 * 10])


@pytest.mark.parametrize(
    "prediction_type, expected",
    [("epsilon", 10.0), ("sample", 5.0), ("v_prediction", 0.8 * 10 - 0.6 * 5)],
)
def test_target_by_hand(prediction_type, expected):
    schedule = NoiseSchedule(np.array([0.64], np.float32), prediction_type)
    target = schedule.target(
        jnp.full((1, 1, 1, 1), 5.0), jnp.full((1, 1, 1, 1), 10.0), jnp.array([0])
    )
    assert float(target[0, 0, 0, 0]) == pytest.approx(expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_gives_image_and_noise_back(prediction_type):
    schedule = scaled_linear_schedule(prediction_type)
    latents, noise = draws()
    t = jnp.array([3, 400, 900])
    noisy = schedule.add_noise(latents, noise, t)
    prediction = schedule.target(latents, noise, t)
    # Dividing by alpha_900 = 0.12 (or sigma_3 = 0.06) costs a digit.
    np.testing.assert_allclose(schedule.to_x0(prediction, noisy, t), latents, atol=1e-5)
    np.testing.assert_allclose(schedule.to_epsilon(prediction, noisy, t), noise, atol=1e-5)


def test_arithmetic_is_float32_for_all_input_types():
    schedule = scaled_linear_schedule("v_prediction")
    latents, noise = (x.astype(jnp.bfloat16) for x in draws())
    t = jnp.array([1, 2, 3])
    for out in (
        schedule.add_noise(latents, noise, t),
        schedule.target(latents, noise, t),
        schedule.to_x0(noise, latents, t),
        schedule.to_epsilon(noise, latents, t),
    ):
        assert out.dtype == jnp.float32


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_its_start():
    plain = scaled_linear_schedule("v_prediction")
    zero = scaled_linear_schedule("v_prediction", zero_terminal_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-6)
    assert np.all(np.diff(zero.alphas_cumprod) < 0)
    latents, noise = draws()
    t = jnp.full((3,), 999)
    np.testing.assert_allclose(zero.add_noise(latents, noise, t), noise)
    np.testing.assert_allclose(zero.to_x0(zero.target(latents, noise, t), noise, t), latents)


def test_a_schedule_is_a_pytree_with_a_static_prediction_type():
    schedule = scaled_linear_schedule("sample")
    leaves, structure = jax.tree.flatten(schedule)
    assert len(leaves) == 1 and "sample" in str(structure)
    latents, noise = draws()
    target = jax.jit(lambda s, z, e: s.target(z, e, jnp.zeros(3, int)))(schedule, latents, noise)
    np.testing.assert_array_equal(target, latents)


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (0.6, 1.0), (-0.5, 0.7)])
def test_logit_normal_timesteps_have_the_quantiles_of_their_law(mean, deviation):
    count = 40_000
    drawn = np.asarray(logit_normal_timesteps(jax.random.key(0), count, 1000, mean, deviation))
    assert drawn.dtype == np.int32
    middle = round(1000 / (1 + math.exp(-mean)))
    for t in (200, 400, middle, 800):
        # t is above T sigmoid(n) where the normal n is below its logit.
        normal = (math.log(t / (1000 - t)) - mean) / deviation
        share = (1 + math.erf(normal / math.sqrt(2))) / 2
        error = math.sqrt(share * (1 - share) / count)
        assert abs(np.mean(drawn < t) - share) < 4 * error
    assert abs(np.mean(drawn < middle) - 0.5) < 0.012


@pytest.mark.parametrize("mean, expected", [(-30.0, 0), (30.0, 999)])
def test_logit_normal_timesteps_stay_in_the_schedule(mean, expected):
    drawn = logit_normal_timesteps(jax.random.key(0), 50, 1000, mean)
    np.testing.assert_array_equal(drawn, expected)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="prediction_type is 'eps'; choose one of epsilon"):
        scaled_linear_schedule("eps")
    with pytest.raises(UserError, match="zero terminal SNR"):
        scaled_linear_schedule("epsilon", zero_terminal_snr=True)
