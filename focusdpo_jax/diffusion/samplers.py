"""From noise to latents: deterministic DDIM as one `lax.scan`, and classifier-free guidance.

    def denoise(z, t):                                # z [2B, h, w, c], t [2B]
        return unet(params, z, t, both_conditionings)  # conditional half first

    z = sample(classifier_free_guidance(denoise, 5.0), schedule, noise, steps=30)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from focusdpo_jax.diffusion.schedule import NoiseSchedule
from focusdpo_jax.errors import UserError

Latents = Float[Array, "batch height width channels"]
DenoiseFn = Callable[[Latents, Int[Array, "batch"]], Latents]

# SDXL's scheduler config counts "leading" timesteps from 1.
_STEPS_OFFSET = 1


def sampling_timesteps(timesteps: int, steps: int, spacing: str = "leading") -> np.ndarray:
    """The timesteps that a sampler visits, from noise to image, int32 [steps].

    Args:
      timesteps: number of training timesteps T.
      steps: number of denoiser calls, 1 to T - 1.
      spacing: `leading`: multiples of T // steps, plus 1 (SDXL); the noisiest lies below T - 1.
        `trailing`: begins at T - 1, as few steps and zero terminal SNR need (arXiv 2305.08891).

    Raises:
      UserError: steps out of range, or unknown spacing.
    """
    if not 1 <= steps < timesteps:
        raise UserError(f"sampling steps is {steps}; choose 1 to {timesteps - 1}")
    if spacing == "leading":
        visited = np.arange(steps)[::-1] * (timesteps // steps) + _STEPS_OFFSET
    elif spacing == "trailing":
        visited = np.rint(timesteps - np.arange(steps) * (timesteps / steps)) - 1
    else:
        raise UserError(f"timestep spacing is {spacing!r}; choose leading or trailing")
    return visited.astype(np.int32)


def classifier_free_guidance(
    denoise_fn: DenoiseFn, scale: Float[Array, ""] | float
) -> DenoiseFn:
    """A denoiser of B latents from one of 2B: one call on [conditional, unconditional].

        prediction = unconditional + scale (conditional - unconditional)

    (Ho & Salimans 2022, arXiv 2207.12598, in the convention where scale 1 is no guidance.)

    Args:
      denoise_fn: takes latents [2B, h, w, c] and timesteps [2B]; its conditioning holds the B
        conditional entries first and the B unconditional ones after them.
      scale: >= 0; may be traced.
    """

    def guided(latents: Latents, t: Int[Array, "batch"]) -> Latents:
        both = denoise_fn(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]))
        conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided


def sample(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    noise: Latents,
    steps: int,
    spacing: str = "leading",
) -> Latents:
    """Deterministic DDIM (Song et al. 2020, arXiv 2010.02502, eta = 0).

        z_s = alpha_s x0(z_t) + sigma_s e(z_t)          from each timestep t to the next one, s

    The last step goes all the way to the clean latents, x0.

    Args:
      denoise_fn: (z_t [B, h, w, c] float32, t [B] int32) -> prediction of the schedule's type.
      schedule: the one the denoiser was trained with.
      noise: standard normal, z at the first timestep.
      steps: number of denoiser calls; static.
      spacing: see `sampling_timesteps`; static.

    Returns:
      Clean latents, float32.

    Raises:
      UserError: see `sampling_timesteps`.
    """
    visited = sampling_timesteps(schedule.timesteps, steps, spacing)
    abar = jnp.asarray(schedule.alphas_cumprod)
    next_abar = jnp.append(abar[visited[1:]], 1.0)
    batch = noise.shape[0]

    def step(latents, now):
        timestep, abar_next = now
        t = jnp.full((batch,), timestep, jnp.int32)
        prediction = denoise_fn(latents, t)
        x0 = schedule.to_x0(prediction, latents, t)
        epsilon = schedule.to_epsilon(prediction, latents, t)
        return jnp.sqrt(abar_next) * x0 + jnp.sqrt(1 - abar_next) * epsilon, None

    latents, _ = jax.lax.scan(step, noise.astype(jnp.float32), (jnp.asarray(visited), next_abar))
    return latents
