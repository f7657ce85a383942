"""The samplers against diffusers' PyTorch schedulers, from one fake denoiser and the same noise."""

import jax
import numpy as np
import pytest

from focusdpo_jax.diffusion import samplers
from focusdpo_jax.diffusion.schedule import NoiseSchedule, scaled_linear_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_euler_ancestral_discrete  # noqa: E402

from tests.parity.oracles import relative_error  # noqa: E402

SDXL = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
)
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False)),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
TOLERANCE = 1e-5
SHAPE = (3, 4, 5, 4)


def scheduler(sampler, **settings):
    kind, defaults = SCHEDULERS[sampler]
    return kind(**{**SDXL, **defaults, **settings})


def fake_denoiser(z, t):
    """Affine in latents and timestep; works on arrays and tensors."""
    return 0.7 * z + t / 1000 - 0.4


def keys_and_noise(shape=SHAPE):
    keys = jax.random.split(jax.random.key(1), shape[0])
    return keys, np.random.default_rng(0).normal(size=shape).astype(np.float32)


def diffusers_sample(theirs, steps, noise, keys, monkeypatch):
    """The loop of diffusers' pipelines; ancestral steps get our noise."""
    draws = iter(range(steps))
    monkeypatch.setattr(
        scheduling_euler_ancestral_discrete,
        "randn_tensor",
        lambda shape, **kwargs: torch.from_numpy(
            np.array(samplers.step_noise(keys, next(draws), tuple(shape[1:])))
        ),
    )
    theirs.set_timesteps(steps)
    latents = torch.from_numpy(noise) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        prediction = fake_denoiser(theirs.scale_model_input(latents, t), t)
        latents = theirs.step(prediction, t, latents).prev_sample
    return latents


def relative_error_of(sampler, steps, spacing, monkeypatch, schedule=None, **settings):
    """How far our latents are from diffusers'.

    Without a schedule ours has diffusers' alphas_cumprod, a product taken in float32 and up to
    2e-5 off, so that the solvers alone are compared.
    """
    name = spacing if isinstance(spacing, str) else spacing.name
    theirs = scheduler(sampler, timestep_spacing=name, **settings)
    prediction_type = theirs.config.prediction_type
    schedule = schedule or NoiseSchedule(theirs.alphas_cumprod.numpy(), prediction_type)
    keys, noise = keys_and_noise()
    expected = diffusers_sample(theirs, steps, noise, keys, monkeypatch)

    def denoise(z, t):
        return fake_denoiser(z, t[:, None, None, None])

    ours = samplers.sample(denoise, schedule, noise, steps, spacing, sampler=sampler, keys=keys)
    return relative_error(ours, expected)


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 4, 25, 30])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_latents_match(sampler, prediction_type, steps, spacing, monkeypatch):
    assert (
        relative_error_of(sampler, steps, spacing, monkeypatch, prediction_type=prediction_type)
        <= TOLERANCE
    )


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_latents_match_where_the_image_is_predicted(sampler, monkeypatch):
    assert (
        relative_error_of(sampler, 10, "leading", monkeypatch, prediction_type="sample")
        <= TOLERANCE
    )


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_latents_match_with_an_offset(sampler, offset, monkeypatch):
    assert (
        relative_error_of(
            sampler, 12, samplers.Spacing("leading", offset), monkeypatch, steps_offset=offset
        )
        <= TOLERANCE
    )


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_latents_match_where_ddim_ends_at_timestep_0(spacing, monkeypatch):
    """As in SDXL's published scheduler_config.json; only DDIM reads it."""
    ends = samplers.Spacing(spacing, set_alpha_to_one=False)
    assert relative_error_of("ddim", 7, ends, monkeypatch, set_alpha_to_one=False) <= TOLERANCE
    apart = relative_error_of("ddim", 7, spacing, monkeypatch, set_alpha_to_one=False)
    # Of 7 trailing timesteps the last is 142 = 1000 // 7, which leads to timestep 0 anyway.
    assert apart > 1e-3 or spacing == "trailing"


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("euler_at_final", [True, False])
@pytest.mark.parametrize("steps", [10, 20])
def test_the_last_step_matches_whatever_the_flags(
    steps, euler_at_final, lower_order_final, monkeypatch
):
    """At a final sigma of 0 diffusers' last step is of first order under all its settings."""
    assert (
        relative_error_of(
            "dpmpp_2m",
            steps,
            "leading",
            monkeypatch,
            euler_at_final=euler_at_final,
            lower_order_final=lower_order_final,
        )
        <= TOLERANCE
    )


@pytest.mark.parametrize(
    "sampler, tolerance, exact_tolerance",
    [
        ("ddim", TOLERANCE, TOLERANCE),
        # Theirs subtracts within x, of norm 4096, in float32: it is 1e-5 off, ours is not.
        ("euler", 3e-5, 5e-4),
        ("euler_a", TOLERANCE, 5e-4),
        # The step after the first depends on the first one's length, infinite or 6.
        ("dpmpp_2m", TOLERANCE, 2e-3),
    ],
)
def test_latents_match_at_zero_terminal_snr(sampler, tolerance, exact_tolerance, monkeypatch):
    """All of theirs but DDIM put alpha = 2^-12 at the last timestep, where ours has 0."""
    settings = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert relative_error_of(sampler, 10, "trailing", monkeypatch, **settings) <= tolerance
    exact = scaled_linear_schedule("v_prediction", zero_terminal_snr=True)
    assert (
        relative_error_of(sampler, 10, "trailing", monkeypatch, schedule=exact, **settings)
        <= exact_tolerance
    )


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_latents_match_with_our_own_schedule(sampler, monkeypatch):
    """As a user has it: SDXL's published defaults, on either side."""
    assert (
        relative_error_of(sampler, 25, "leading", monkeypatch, schedule=scaled_linear_schedule())
        <= TOLERANCE
    )


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_timesteps_match(sampler, spacing):
    theirs = scheduler(sampler, timestep_spacing=spacing)
    # With counts such as 30 or 48, where float64 rounding decides between two timesteps.
    for steps in (*range(1, 60), 64, 96, 100, 128, 250):
        theirs.set_timesteps(steps)
        ours = samplers.sampling_timesteps(1000, steps, spacing, sampler)
        np.testing.assert_array_equal(ours, theirs.timesteps.numpy()[:steps], err_msg=str(steps))
