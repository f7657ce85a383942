"""The samplers against cases with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.diffusion import samplers
from focusdpo_jax.diffusion.schedule import NoiseSchedule, scaled_linear_schedule
from focusdpo_jax.errors import UserError

DENOISE = lambda latents, t: latents


def test_timesteps_by_hand():
    assert samplers.sampling_timesteps(1000, 4).tolist() == [751, 501, 251, 1]
    assert samplers.sampling_timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert samplers.sampling_timesteps(1000, 3, "trailing").tolist() == [999, 666, 332]
    assert samplers.sampling_timesteps(1000, 4, "linspace").tolist() == [999, 666, 333, 0]
    # DPM-Solver++ lays a fifth timestep, for the clean end.
    assert samplers.sampling_timesteps(1000, 4, "leading", "dpmpp_2m").tolist() == [
        801,
        601,
        401,
        201,
    ]
    assert samplers.sampling_timesteps(1000, 4, "linspace", "dpmpp_2m").tolist() == [
        999,
        749,
        500,
        250,
    ]


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize(
    "sampler, most", [("ddim", 999), ("euler", 999), ("euler_a", 999), ("dpmpp_2m", 998)]
)
def test_as_many_steps_as_there_are(sampler, most, spacing):
    every = samplers.sampling_timesteps(1000, most, spacing, sampler)
    assert every.max() <= 999 and every.min() >= 0 and np.all(np.diff(every) < 0)
    with pytest.raises(UserError, match=f"steps is {most + 1}; choose 1 to {most}"):
        samplers.sampling_timesteps(1000, most + 1, spacing, sampler)


@pytest.mark.parametrize(
    "steps, spacing, message",
    [(0, "leading", "steps is 0"), (1000, "leading", "steps is 1000"), (4, "even", "'even'")],
)
def test_mistakes_are_named(steps, spacing, message):
    with pytest.raises(UserError, match=message):
        samplers.sampling_timesteps(1000, steps, spacing)


def test_an_unknown_sampler_is_refused_with_the_choices():
    with pytest.raises(UserError, match="'heun'; choose one of ddim, euler, euler_a, dpmpp_2m"):
        samplers.sample(
            DENOISE, scaled_linear_schedule(), jnp.zeros((1, 1, 1, 1)), 4, sampler="heun"
        )


def test_an_ancestral_sampler_requires_keys():
    with pytest.raises(ValueError, match="'euler_a' draws noise at every step; pass keys"):
        samplers.sample(
            DENOISE, scaled_linear_schedule(), jnp.zeros((1, 1, 1, 1)), 4, sampler="euler_a"
        )


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


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_zero_terminal_snr_leads_to_the_image_too(sampler, steps):
    schedule = scaled_linear_schedule("v_prediction", zero_terminal_snr=True)
    image, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 4))

    def oracle(noisy, t):
        alpha, sigma = schedule.signal_and_noise(t)
        return schedule.target(image, (noisy - alpha * image) / sigma, t)

    out = samplers.sample(
        oracle,
        schedule,
        noise,
        steps,
        "trailing",
        sampler=sampler,
        keys=jax.random.split(jax.random.key(1), 2),
    )
    np.testing.assert_allclose(out, image, atol=1e-4)


SPREAD = 0.5


def best_for_a_gaussian(noisy, t):
    """The best denoiser for data N(0, SPREAD^2): it is linear."""
    alpha, sigma = scaled_linear_schedule().signal_and_noise(t)
    return noisy * sigma / (alpha**2 * SPREAD**2 + sigma**2)


def test_a_gaussian_comes_out_with_its_own_spread():
    out = samplers.sample(
        best_for_a_gaussian, scaled_linear_schedule(), jnp.ones((1, 1, 1, 1)), 500
    )
    # Noise of size 1 at abar = 0.0047 stands for 0.996 of a standard deviation there.
    assert float(out[0, 0, 0, 0]) == pytest.approx(SPREAD, rel=0.01)


def test_dpmpp_2m_has_a_smaller_error_than_ddim():
    """For a Gaussian the exact flow is known: each sample keeps its number of standard deviations."""
    schedule, steps, error = scaled_linear_schedule(), 20, {}
    for sampler in ("ddim", "dpmpp_2m"):
        out = samplers.sample(
            best_for_a_gaussian, schedule, jnp.ones((1, 1, 1, 1)), steps, sampler=sampler
        )
        visited = samplers.sampling_timesteps(1000, steps, sampler=sampler)
        abar = schedule.alphas_cumprod[visited[[0, -1]]].astype(np.float64)
        first, last = np.sqrt(abar * SPREAD**2 + 1 - abar)
        # The flow takes 1 to last / first; the last step goes to the mean of what that may be.
        exact = np.sqrt(abar[1]) * SPREAD**2 / (first * last)
        error[sampler] = abs(float(out[0, 0, 0, 0]) / exact - 1)
    assert error["dpmpp_2m"] < 0.01 < 0.1 < error["ddim"]


def test_ancestral_samples_of_a_gaussian_have_its_spread():
    keys = jax.random.split(jax.random.key(0), 64)
    noise = jax.random.normal(jax.random.key(1), (64, 8, 8, 1))
    out = samplers.sample(
        best_for_a_gaussian, scaled_linear_schedule(), noise, 200, sampler="euler_a", keys=keys
    )
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.05)
    # The noise drawn on the way has made them forget where they began.
    assert abs(np.corrcoef(out.ravel(), noise.ravel())[0, 1]) < 0.2


def test_ancestral_noise_of_each_image_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(0), 3)

    def run(keys):
        return samplers.sample(
            best_for_a_gaussian,
            scaled_linear_schedule(),
            jnp.ones((len(keys), 2, 2, 1)),
            4,
            sampler="euler_a",
            keys=keys,
        )

    together = run(keys)
    assert len(np.unique(together)) == together.size
    np.testing.assert_allclose(together[1:2], run(keys[1:2]), rtol=1e-5)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_one_program_serves_every_step_schedule_and_noise(sampler):
    traced = []

    def denoise(z, t):
        traced.append(z.shape)
        return 0.5 * z

    @jax.jit
    def run(schedule, noise, keys):
        return samplers.sample(denoise, schedule, noise, 6, sampler=sampler, keys=keys)

    keys = jax.random.split(jax.random.key(0), 2)
    for beta_end in (0.012, 0.02):
        run(scaled_linear_schedule(beta_end=beta_end), jnp.ones((2, 2, 2, 1)), keys)
    assert len(traced) == 1


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


def test_only_above_one_there_is_guidance():
    assert [samplers.guides(scale) for scale in (-1, 0, 0.5, 1, 1.01, 7)] == [False] * 4 + [
        True
    ] * 2
    for scale in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"guidance is {scale}; give a finite number"):
            samplers.guides(scale)


def test_the_first_step_of_a_strength():
    assert [samplers.first_step(10, s) for s in (1.0, 0.8, 0.55, 0.1)] == [0, 2, 5, 9]
    for strength in (0.0, 1.1, 0.05):
        with pytest.raises(UserError, match=f"strength is {strength} of 10 steps; choose a share"):
            samplers.first_step(10, strength)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_known_regions_are_kept_and_the_rest_is_sampled(sampler):
    """An oracle for one image; half of the result is another image that is kept."""
    schedule = scaled_linear_schedule("v_prediction", zero_terminal_snr=True)
    image, known, noise = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 2))
    kept = jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1.0)
    seen = []

    def oracle(noisy, t):
        jax.debug.callback(lambda z, step: seen.append((int(step[0]), np.array(z))), noisy, t)
        alpha, sigma = schedule.signal_and_noise(t)
        return schedule.target(image, (noisy - alpha * image) / sigma, t)

    drawn = samplers.sample(
        oracle,
        schedule,
        noise,
        10,
        "trailing",
        sampler=sampler,
        keys=jax.random.split(jax.random.key(1), 2),
        known=samplers.Known(latents=known, kept=kept, strength=0.5),
    )
    np.testing.assert_allclose(drawn[:, :2], known[:, :2], atol=1e-5)
    np.testing.assert_allclose(drawn[:, 2:], image[:, 2:], atol=2e-4)
    jax.effects_barrier()
    assert [step for step, _ in seen] == [499, 399, 299, 199, 99]
    for step, latents in seen:  # Whatever is drawn, the denoiser sees what is known as noised.
        expected = schedule.add_noise(known, noise, jnp.full(2, step))
        np.testing.assert_allclose(latents[:, :2], expected[:, :2], atol=1e-5)
    np.testing.assert_allclose(  # At the start all of it is.
        seen[0][1], schedule.add_noise(known, noise, jnp.full(2, 499)), atol=1e-5
    )
