"""The noise schedule against diffusers' PyTorch schedulers."""

import jax
import numpy as np
import pytest

from focusdpo_jax.diffusion.schedule import scaled_linear_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SDXL = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


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
        ours.add_noise(latents, noise, t), theirs.add_noise(*tensors), atol=1e-5
    )
    np.testing.assert_allclose(
        ours.target(latents, noise, t), theirs.get_velocity(*tensors), atol=1e-5
    )


def test_zero_terminal_snr_matches():
    theirs = diffusers.DDIMScheduler(
        **SDXL, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    ours = scaled_linear_schedule("v_prediction", zero_terminal_snr=True)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)


def test_the_published_sdxl_defaults_are_ours():
    """SDXL's noise levels as its Euler sampler states them: sigma = sqrt((1 - abar) / abar)."""
    theirs = diffusers.EulerDiscreteScheduler(**SDXL)
    abar = jax.device_get(scaled_linear_schedule().alphas_cumprod)
    assert float(theirs.sigmas[0]) == pytest.approx(np.sqrt((1 - abar[-1]) / abar[-1]), rel=1e-4)
