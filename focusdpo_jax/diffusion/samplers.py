"""Four diffusion samplers as one `lax.scan`, and classifier-free guidance.

    def denoise(z, t):                                # z [2B, h, w, c], t [2B]
        return unet(params, z, t, both_conditionings)  # conditional half first

    denoise = classifier_free_guidance(denoise, 5.0)
    z = sample(denoise, schedule, noise, steps=25, sampler="dpmpp_2m")

A sampler is a table of coefficients. Let x0 and e be the clean latents and the noise that the
prediction for z_t implies, and n fresh normal noise. A step from timestep t to the next, s, is:

    z_s = alpha_s x0 + kept e + fresh n + correction (x0 - x0')

    sampler      kept          fresh                     correction
    ddim, euler  sigma_s       0                         0
    euler_a      sigma_s rho   sigma_s sqrt(1 - rho^2)   0
    dpmpp_2m     sigma_s       0                         alpha_s (1 - rho) h / (2 h')

    rho = exp(-h) = (sigma_s / alpha_s) / (sigma_t / alpha_t)

h is the step in log(alpha / sigma); x0' and h' are the values of the previous step. The last step
returns the clean latents x0. Timesteps and noise levels equal those of diffusers' scheduler of the
same name. In particular, its DDIM steps from t to the level at t - T // steps, which differs from
the next timestep with some spacings, and its Euler samplers use fractional timesteps with
`linspace`.

The Euler samplers are usually formulated for x = z / alpha with noise level sigma / alpha. Then the
input of the denoiser has to be scaled, the initial noise has scale `init_noise_sigma`, and zero
terminal SNR is an infinite noise level. For z no scale is needed, and zero terminal SNR means that
alpha is 0.

`Known` defines an existing image to edit. With a `strength` below 1, sampling starts from its
noised latents and runs only the last share of the steps. Kept regions are restored after each step.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from focusdpo_jax.array_types import AnyArray, IntScalar, Scalar
from focusdpo_jax.diffusion.schedule import NoiseSchedule
from focusdpo_jax.errors import UserError

Latents = Float[AnyArray, "batch height width channels"]
# Some samplers use fractional timesteps; see `sampling_timesteps`.
Timesteps = Int[AnyArray, "batch"] | Float[AnyArray, "batch"]
DenoiseFn = Callable[[Latents, Timesteps], Latents]

SPACINGS = ("leading", "trailing", "linspace")


@dataclasses.dataclass(frozen=True)
class Spacing:
    """Selects the sampling timesteps, with the fields of diffusers' scheduler_config.json.

    Attributes:
      name: one of `SPACINGS` (arXiv 2305.08891, table 2).
      steps_offset: the last timestep of `leading`, 1 for SDXL; ignored by the other spacings.
      set_alpha_to_one: whether DDIM's last step returns the clean latents; otherwise it ends at
        timestep 0. The other samplers always return the clean latents.
    """

    name: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = True

    def __post_init__(self):
        if self.name not in SPACINGS:
            raise UserError(
                f"timestep spacing is {self.name!r}; choose one of {', '.join(SPACINGS)}"
            )


class _Coefficients(NamedTuple):
    """The columns of the module's table, one entry per step; None for a column of zeros."""

    kept: Float[Array, "steps"]
    fresh: Float[Array, "steps"] | None = None
    correction: Float[Array, "steps"] | None = None


# The arguments of these functions are alpha and sigma, [steps + 1], at the sampling timesteps and
# for the clean latents.


def _noise_ratio(alpha, sigma):
    """Returns rho of each step, [steps]; 0 for the last step, and for a start at alpha = 0."""
    return (sigma[1:] * alpha[:-1]) / (alpha[1:] * sigma[:-1])


def _first_order(alpha, sigma):
    """DDIM with eta = 0 (Song et al. 2020, arXiv 2010.02502): Euler's method in x = z / alpha."""
    del alpha
    return _Coefficients(kept=sigma[1:])


def _ancestral(alpha, sigma):
    """Replaces part of the noise by fresh noise of equal variance (Song et al. 2020, eta = 1)."""
    rho = _noise_ratio(alpha, sigma)
    return _Coefficients(kept=sigma[1:] * rho, fresh=sigma[1:] * jnp.sqrt(1 - jnp.square(rho)))


def _second_order(alpha, sigma):
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step, which has no predecessor, and the last one, for which h is infinite, are of
    first order.
    """
    steps = len(sigma) - 1
    h = jnp.diff(jnp.log(alpha / sigma))
    full = alpha[1:] * (1 - _noise_ratio(alpha, sigma)) / 2
    inner = full[1:-1] * h[1:-1] / h[:-2]
    return _Coefficients(kept=sigma[1:], correction=jnp.zeros(steps).at[1:-1].set(inner))


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """The properties of a sampler.

    Attributes:
      coefficients: (alpha, sigma) [steps + 1] -> the columns of the table.
      scales_initial_noise: starts at z = sigma n instead of z = n if the spacing starts at the last
        training timestep; equivalent to diffusers' `init_noise_sigma`.
      spaces_final_step: spaces steps + 1 timesteps, the last of which is replaced by the clean
        latents.
      steps_by_stride: steps from t to t - T // steps, independent of the next timestep.
      fractional: `linspace` does not round; levels are interpolated between training timesteps.
    """

    coefficients: Callable[[Float[Array, "ends"], Float[Array, "ends"]], _Coefficients]
    scales_initial_noise: bool = False
    spaces_final_step: bool = False
    steps_by_stride: bool = False
    fractional: bool = False


# Initial noise and timesteps equal those of diffusers' schedulers, so that images can be compared.
_SAMPLERS = {
    "ddim": _Sampler(_first_order, steps_by_stride=True),
    "euler": _Sampler(_first_order, scales_initial_noise=True, fractional=True),
    "euler_a": _Sampler(_ancestral, scales_initial_noise=True, fractional=True),
    "dpmpp_2m": _Sampler(_second_order, spaces_final_step=True),
}
SAMPLERS = tuple(_SAMPLERS)


def _get_sampler(name: str) -> _Sampler:
    if name not in _SAMPLERS:
        raise UserError(f"sampler is {name!r}; choose one of {', '.join(SAMPLERS)}")
    return _SAMPLERS[name]


def sampling_timesteps(
    timesteps: int, steps: int, spacing: Spacing | str = "leading", sampler: str = "ddim"
) -> np.ndarray:
    """Returns the sampling timesteps from noise to image: [steps], int32 or float32.

    Args:
      timesteps: number of training timesteps T.
      steps: number of denoiser calls, 1 to T - 1 (T - 2 with `dpmpp_2m`).
      spacing: a `Spacing`, or the name of one:
        `leading`: multiples of T // steps, plus the offset; the largest is below T - 1.
        `trailing`: starts at T - 1, as required for few steps and for zero terminal SNR.
        `linspace`: from T - 1 to 0, rounded; with the Euler samplers float32 and not rounded. (A
        single step is at 0 with these and with `ddim`.)
        With `leading` and `linspace`, `dpmpp_2m` computes steps + 1 timesteps and omits the last.
      sampler: one of `SAMPLERS`.

    Raises:
      UserError: steps out of range, unknown spacing or sampler.
    """
    method = _get_sampler(sampler)
    spacing = _as_spacing(spacing)
    spaced = steps + method.spaces_final_step
    if steps < 1 or spaced >= timesteps:
        raise UserError(
            f"sampling steps is {steps}; choose 1 to {timesteps - 1 - (spaced - steps)}"
        )
    # The same arithmetic as in diffusers, since rounding affects the result for some step counts.
    if spacing.name == "leading":
        times = np.arange(spaced)[::-1] * (timesteps // spaced) + spacing.steps_offset
    elif spacing.name == "trailing":
        times = np.round(np.arange(timesteps, 0, -timesteps / steps)) - 1
    elif method.fractional:
        return np.linspace(0, timesteps - 1, spaced, dtype=np.float32)[::-1]
    else:
        times = np.linspace(0, timesteps - 1, spaced).round()[::-1]
    if times[0] >= timesteps:
        raise UserError(
            f"steps_offset is {spacing.steps_offset}: {steps} steps would begin at "
            f"timestep {times[0]}, of {timesteps}; give fewer steps"
        )
    return times[:steps].astype(np.int32)


def _as_spacing(spacing):
    return Spacing(spacing) if isinstance(spacing, str) else spacing


def _levels(schedule, times):
    """Returns alpha and sigma at `times`, each [steps]; sigma / alpha is interpolated linearly."""
    abar = jnp.asarray(schedule.alphas_cumprod)
    low = np.floor(times).astype(np.int32)
    share = times - low
    if not share.any():
        return jnp.sqrt(abar[low]), jnp.sqrt(1 - abar[low])
    ratio = jnp.sqrt((1 - abar) / abar)  # Infinite where there is no signal.
    high = np.minimum(low + 1, len(abar) - 1)
    ratio = jnp.where(share == 0, ratio[low], (1 - share) * ratio[low] + share * ratio[high])
    alpha = 1 / jnp.sqrt(1 + jnp.square(ratio))
    return alpha, jnp.where(jnp.isinf(ratio), 1, ratio * alpha)


def guides(scale: float) -> bool:
    """Returns whether a guidance scale enables guidance, that is, whether it is above 1.

    As in diffusers, a scale of 0 also disables guidance; it does not select the unconditional
    branch.

    Raises:
      UserError: the scale is not a finite number.
    """
    if not np.isfinite(scale):
        raise UserError(f"guidance is {scale}; give a finite number, 1 or less for none")
    return scale > 1


def classifier_free_guidance(
    denoise_fn: DenoiseFn, scale: Scalar | Float[Array, "batch 1 1 1"]
) -> DenoiseFn:
    """Returns a guided denoiser of B latents, which makes one call of a denoiser of 2B latents.

        prediction = unconditional + scale (conditional - unconditional)

    Source: Ho & Salimans 2022, arXiv 2207.12598, in the convention where scale 1 disables guidance.

    Args:
      denoise_fn: denoiser of latents [2B, h, w, c] at timesteps [2B]. Its conditioning contains B
        conditional entries, followed by B unconditional ones.
      scale: guidance scale >= 0, one for all images or one each; may be traced.
    """

    def guided(latents: Latents, t: Timesteps) -> Latents:
        both = denoise_fn(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]))
        conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """An existing image to edit, as clean latents.

    Attributes:
      latents: float32 [B, h, w, C], or [1, h, w, C] for all images.
      kept: [B or 1, h, w, 1] in [0, 1]. Where it is 1, the result equals `latents`: after every
        step the sample is replaced there by `latents` at the next noise level, with the initial
        noise (RePaint, arXiv 2201.09865, without resampling; the method of diffusers' inpainting
        pipelines for a UNet with 4 channels). None keeps nothing.
      strength: share of the steps to run, in (0, 1]; 1 starts from pure noise.
    """

    latents: Latents
    kept: Float[AnyArray, "kept_batch height width 1"] | None = None
    strength: float = 1.0


def first_step(steps: int, strength: float) -> int:
    """Returns the index of the first of the last int(steps * strength) steps.

    Raises:
      UserError: `strength` is outside (0, 1], or so small that no step is left.
    """
    count = int(steps * strength) if 0 < strength <= 1 else 0
    if not count:
        raise UserError(
            f"strength is {strength} of {steps} steps; choose a share of 1 step or "
            f"more: {1 / steps:.3g} to 1"
        )
    return steps - count


def step_noise(
    keys: Key[Array, "batch"], step: IntScalar, shape: tuple[int, ...]
) -> Float[Array, "batch height width channels"]:
    """Returns the noise of an ancestral step, [B, *shape]; a row depends only on its own key."""

    def normal(key):
        return jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)

    return jax.vmap(normal)(keys)


def sample(
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    noise: Latents,
    steps: int,
    spacing: Spacing | str = "leading",
    *,
    sampler: str = "ddim",
    keys: Key[Array, "batch"] | None = None,
    known: Known | None = None,
) -> Float[Array, "batch height width channels"]:
    """Generates clean latents from noise; see the module's docstring for the update.

    Args:
      denoise_fn: (z_t [B, h, w, c] float32, t [B] int32, or float32 for fractional timesteps)
        -> prediction of the schedule's type.
      schedule: the schedule with which the denoiser was trained. Zero terminal SNR requires a
        spacing that starts at the last training timestep: `trailing` or `linspace`.
      noise: standard normal noise for all samplers and spacings.
      steps: number of denoiser calls; static.
      spacing: see `sampling_timesteps`; static.
      sampler: one of `SAMPLERS`; static.
      keys: one key per image for `euler_a`, which samples noise at every step, so that an image
        does not depend on its batch. The other samplers ignore it.
      known: existing image to edit; None generates from noise. Its `strength` is static.

    Returns:
      Clean latents, float32.

    Raises:
      UserError: see `sampling_timesteps` and `first_step`.
      ValueError: `euler_a` without keys.
    """
    method, spacing = _get_sampler(sampler), _as_spacing(spacing)
    first = 0 if known is None else first_step(steps, known.strength)
    times = sampling_timesteps(schedule.timesteps, steps, spacing, sampler)[first:]
    alpha, sigma = (
        jnp.append(level, end) for level, end in zip(_levels(schedule, times), (1.0, 0.0))
    )
    coefficients, alpha_next = method.coefficients(alpha, sigma), alpha[1:]
    if method.steps_by_stride:
        following = times - schedule.timesteps // steps
        abar = jnp.asarray(schedule.alphas_cumprod)
        abar = jnp.where(
            following >= 0,
            abar[np.maximum(following, 0)],
            1.0 if spacing.set_alpha_to_one else abar[0],
        )
        alpha_next, coefficients = jnp.sqrt(abar), _Coefficients(kept=jnp.sqrt(1 - abar))
    if coefficients.fresh is not None and keys is None:
        raise ValueError(
            f"sampler {sampler!r} draws noise at every step; pass keys, one for each "
            "of the latents: jax.random.split(key, len(noise))"
        )

    def step(carry, row):
        latents, previous_x0 = carry
        number, timestep, level, next_level, alpha_next, (kept, fresh, correction) = row
        prediction = denoise_fn(latents, jnp.full((latents.shape[0],), timestep))
        x0 = schedule.x0_at(prediction, latents, *level)
        latents = alpha_next * x0 + kept * schedule.epsilon_at(prediction, latents, *level)
        if correction is not None:
            latents += correction * (x0 - previous_x0)
        if fresh is not None and keys is not None:
            latents += fresh * step_noise(keys, number, latents.shape[1:])
        if known is not None and known.kept is not None:
            noised = next_level[0] * known.latents + next_level[1] * noise
            latents = known.kept * noised + (1 - known.kept) * latents
        return (latents, x0), None

    start = jnp.asarray(noise, jnp.float32)
    if known is not None and first:
        start = alpha[0] * known.latents + sigma[0] * start
    elif method.scales_initial_noise and spacing.name != "leading":
        start = sigma[0] * start
    table = (
        jnp.arange(first, steps),
        jnp.asarray(times),
        (alpha[:-1], sigma[:-1]),
        (alpha[1:], sigma[1:]),
        alpha_next,
        coefficients,
    )
    (latents, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), table)
    return latents
