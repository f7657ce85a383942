"""Schedule and sampler against diffusers' PyTorch schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.diffusion.samplers import sample, sampling_timesteps
from focusdpo_jax.diffusion.schedule import scaled_linear_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
            beta_schedule="scaled_linear")


def draws(shape=(4, 3, 3, 4)):
    return np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)


def test_noise_and_velocity_match_ddpm():
    theirs = diffusers.DDPMScheduler(**SDXL)
    ours = scaled_linear_schedule("v_prediction")
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    latents, noise = draws()
    t = np.array([0, 1, 500, 999])
    tensors = torch.from_numpy(latents), torch.from_numpy(noise), torch.from_numpy(t)
    np.testing.assert_allclose(
        ours.add_noise(latents, noise, t), theirs.add_noise(*tensors), atol=1e-5)
    np.testing.assert_allclose(
        ours.target(latents, noise, t), theirs.get_velocity(*tensors), atol=1e-5)


def test_zero_terminal_snr_matches():
    theirs = diffusers.DDIMScheduler(
        **SDXL, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = scaled_linear_schedule("v_prediction", zero_terminal_snr=True)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing, steps", [("leading", 7), ("leading", 10), ("trailing", 10)])
def test_ddim_matches(prediction_type, spacing, steps):
    theirs = diffusers.DDIMScheduler(
        **SDXL, prediction_type=prediction_type, timestep_spacing=spacing, steps_offset=1,
        clip_sample=False)
    theirs.set_timesteps(steps)
    np.testing.assert_array_equal(sampling_timesteps(1000, steps, spacing), theirs.timesteps)

    _, noise = draws()
    # Any denoiser will do that is not linear and looks at t.
    latents = torch.from_numpy(noise)
    for t in theirs.timesteps:
        prediction = torch.tanh(latents + t / 1000)
        latents = theirs.step(prediction, t, latents).prev_sample

    denoise = lambda z, t: jnp.tanh(z + t[:, None, None, None] / 1000)
    ours = sample(denoise, scaled_linear_schedule(prediction_type), noise, steps, spacing)
    np.testing.assert_allclose(ours, latents, rtol=1e-4, atol=1e-4)


def test_the_published_sdxl_defaults_are_ours():
    """SDXL's noise levels as its Euler sampler states them: sigma = sqrt((1 - abar) / abar)."""
    theirs = diffusers.EulerDiscreteScheduler(**SDXL)
    abar = jax.device_get(scaled_linear_schedule().alphas_cumprod)
    assert float(theirs.sigmas[0]) == pytest.approx(np.sqrt((1 - abar[-1]) / abar[-1]), rel=1e-4)
