"""Discrete-time diffusion: noise schedules, samplers and guidance.

Requires only jax, numpy and jaxtyping.
"""

from focusdpo_jax.diffusion import samplers, schedule
from focusdpo_jax.diffusion.samplers import SAMPLERS, Spacing, classifier_free_guidance, sample
from focusdpo_jax.diffusion.schedule import (
    NoiseSchedule,
    logit_normal_timesteps,
    scaled_linear_schedule,
)
