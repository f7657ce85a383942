"""From noise to latents: four samplers as one `lax.scan`, and classifier-free guidance.

    def denoise(z, t):                                # z [2B, h, w, c], t [2B]
        return unet(params, z, t, both_conditionings)  # conditional half first

    denoise = classifier_free_guidance(denoise, 5.0)
    z = sample(denoise, schedule, noise, steps=25, sampler="dpmpp_2m")

A sampler is a table of coefficients. With x0 and e, which the prediction for z_t implies, and fresh
normal noise n, a step goes from timestep t to the next one, s:

    z_s = alpha_s x0 + kept e + fresh n + correction (x0 - x0')

    sampler      kept          fresh                     correction
    ddim, euler  sigma_s       0                         0
    euler_a      sigma_s rho   sigma_s sqrt(1 - rho^2)   0
    dpmpp_2m     sigma_s       0                         alpha_s (1 - rho) h / (2 h')

    rho = exp(-h) = (sigma_s / alpha_s) / (sigma_t / alpha_t)

(h is the step in log(alpha / sigma); x0' and h' are those of the step before.) The last step goes
all the way to the clean latents, x0. Timesteps and levels are those of diffusers' scheduler of the
same name, to the letter: its DDIM steps from t to the level at t - T // steps, which with some
spacings is not quite the timestep that it visits next, and its Euler samplers visit fractions of
timesteps with `linspace`.

The Euler samplers are usually written for x = z / alpha, of noise level sigma / alpha. There a
denoiser's input has to be scaled, the noise begins at `init_noise_sigma`, and zero terminal SNR is
an infinite level. In z every input has its scale already, and that level is alpha = 0.

A picture that is there can be drawn over (`Known`): from a `strength` below 1 on, it is noised to
where the last share of the steps begins; and what is to be kept of it is put back after every step.
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
# Fractions where a sampler visits them; see `sampling_timesteps`.
Timesteps = Int[AnyArray, "batch"] | Float[AnyArray, "batch"]
DenoiseFn = Callable[[Latents, Timesteps], Latents]

SPACINGS = ("leading", "trailing", "linspace")


@dataclasses.dataclass(frozen=True)
class Spacing:
    """Which timesteps are visited, in the terms of a scheduler_config.json of diffusers.

    Attributes:
      name: one of `SPACINGS` (arXiv 2305.08891, table 2).
      steps_offset: the last timestep of `leading`, 1 for SDXL; the others have none.
      set_alpha_to_one: whether DDIM's last step goes to the clean latents; otherwise it goes to
        timestep 0. The others always go to the clean latents.
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
    """The columns of the module's table, one entry a step; None where the term is absent."""

    kept: Float[Array, "steps"]
    fresh: Float[Array, "steps"] | None = None
    correction: Float[Array, "steps"] | None = None


# Each of these takes alpha and sigma, [steps + 1], at the timesteps visited and at the clean end.


def _noise_ratio(alpha, sigma):
    """rho of each step, [steps]; 0 on the last, and on one that begins without any signal."""
    return (sigma[1:] * alpha[:-1]) / (alpha[1:] * sigma[:-1])


def _first_order(alpha, sigma):
    """DDIM with eta = 0 (Song et al. 2020, arXiv 2010.02502): Euler's method in x = z / alpha."""
    del alpha
    return _Coefficients(kept=sigma[1:])


def _ancestral(alpha, sigma):
    """Part of the noise is replaced by as much fresh noise (Song et al. 2020, eta = 1)."""
    rho = _noise_ratio(alpha, sigma)
    return _Coefficients(kept=sigma[1:] * rho, fresh=sigma[1:] * jnp.sqrt(1 - jnp.square(rho)))


def _second_order(alpha, sigma):
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step has no predecessor and the last is infinitely long: both are of first order.
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
      coefficients: (alpha, sigma) [steps + 1] -> its columns of the table.
      starts_without_signal: begins at z = sigma n rather than z = n where the spacing begins at the
        noisiest timestep, which is what diffusers' `init_noise_sigma` comes to.
      lays_the_end: spreads steps + 1 timesteps, of which the last stands for the clean end.
      steps_back: goes from t to t - T // steps, whatever the next timestep is.
      between: `linspace` does not round, and levels lie between two timesteps.
    """

    coefficients: Callable[[Float[Array, "ends"], Float[Array, "ends"]], _Coefficients]
    starts_without_signal: bool = False
    lays_the_end: bool = False
    steps_back: bool = False
    between: bool = False


# Start and timesteps are those of diffusers' scheduler for each, so that pictures can be compared.
_SAMPLERS = {
    "ddim": _Sampler(_first_order, steps_back=True),
    "euler": _Sampler(_first_order, starts_without_signal=True, between=True),
    "euler_a": _Sampler(_ancestral, starts_without_signal=True, between=True),
    "dpmpp_2m": _Sampler(_second_order, lays_the_end=True),
}
SAMPLERS = tuple(_SAMPLERS)


def _sampler_named(name: str) -> _Sampler:
    if name not in _SAMPLERS:
        raise UserError(f"sampler is {name!r}; choose one of {', '.join(SAMPLERS)}")
    return _SAMPLERS[name]


def sampling_timesteps(
    timesteps: int, steps: int, spacing: Spacing | str = "leading", sampler: str = "ddim"
) -> np.ndarray:
    """The timesteps that a sampler visits, from noise to image: [steps], int32.

    Args:
      timesteps: number of training timesteps T.
      steps: number of denoiser calls, 1 to T - 1 (T - 2 with `dpmpp_2m`).
      spacing: a `Spacing`, or the name of one:
        `leading`: multiples of T // steps, plus the offset; the noisiest is below T - 1.
        `trailing`: begins at T - 1, as few steps and zero terminal SNR need.
        `linspace`: from T - 1 to 0, rounded; with the Euler samplers not rounded, float32. (A single
        step of those and of `ddim` is at 0.)
        `dpmpp_2m` reads `leading` and `linspace` with steps + 1 for steps and visits all but the
        last.
      sampler: one of `SAMPLERS`.

    Raises:
      UserError: steps out of range, unknown spacing or sampler.
    """
    chosen = _sampler_named(sampler)
    spacing = _as_spacing(spacing)
    laid = steps + chosen.lays_the_end
    if steps < 1 or laid >= timesteps:
        raise UserError(f"sampling steps is {steps}; choose 1 to {timesteps - 1 - (laid - steps)}")
    # In the arithmetic of diffusers, whose rounding decides between two timesteps at some counts.
    if spacing.name == "leading":
        visited = np.arange(laid)[::-1] * (timesteps // laid) + spacing.steps_offset
    elif spacing.name == "trailing":
        visited = np.round(np.arange(timesteps, 0, -timesteps / steps)) - 1
    elif chosen.between:
        return np.linspace(0, timesteps - 1, laid, dtype=np.float32)[::-1]
    else:
        visited = np.linspace(0, timesteps - 1, laid).round()[::-1]
    if visited[0] >= timesteps:
        raise UserError(
            f"steps_offset is {spacing.steps_offset}: {steps} steps would begin at "
            f"timestep {visited[0]}, of {timesteps}; give fewer steps"
        )
    return visited[:steps].astype(np.int32)


def _as_spacing(spacing):
    return Spacing(spacing) if isinstance(spacing, str) else spacing


def _levels(schedule, visited):
    """alpha and sigma at timesteps, each [steps]; between two of them sigma / alpha is linear."""
    abar = jnp.asarray(schedule.alphas_cumprod)
    low = np.floor(visited).astype(np.int32)
    share = visited - low
    if not share.any():
        return jnp.sqrt(abar[low]), jnp.sqrt(1 - abar[low])
    ratio = jnp.sqrt((1 - abar) / abar)  # Infinite where there is no signal.
    high = np.minimum(low + 1, len(abar) - 1)
    ratio = jnp.where(share == 0, ratio[low], (1 - share) * ratio[low] + share * ratio[high])
    alpha = 1 / jnp.sqrt(1 + jnp.square(ratio))
    return alpha, jnp.where(jnp.isinf(ratio), 1, ratio * alpha)


def guides(scale: float) -> bool:
    """Returns whether a scale means guidance: above 1. Otherwise the denoiser is conditional alone.

    As in diffusers, where `guidance_scale` 0 means no guidance too, rather than the unconditional
    half by itself.

    Raises:
      UserError: it is no finite number.
    """
    if not np.isfinite(scale):
        raise UserError(f"guidance is {scale}; give a finite number, 1 or less for none")
    return scale > 1


def classifier_free_guidance(denoise_fn: DenoiseFn, scale: Scalar) -> DenoiseFn:
    """A denoiser of B latents from one of 2B: one call on [conditional, unconditional].

        prediction = unconditional + scale (conditional - unconditional)

    (Ho & Salimans 2022, arXiv 2207.12598, in the convention where scale 1 is no guidance.)

    Args:
      denoise_fn: takes latents [2B, h, w, c] and timesteps [2B]; its conditioning holds the B
        conditional entries first and the B unconditional ones after them.
      scale: >= 0; may be traced.
    """

    def guided(latents: Latents, t: Timesteps) -> Latents:
        both = denoise_fn(jnp.concatenate([latents, latents]), jnp.concatenate([t, t]))
        conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Clean latents to begin from, and which of them stay.

    Attributes:
      latents: float32 [B, h, w, C], or [1, h, w, C] for all.
      kept: [B or 1, h, w, 1] in [0, 1]. Where it is 1, the result is `latents`: after every step
        they take the place of what was drawn there, noised to the timestep that comes next with
        the noise of the start (RePaint without its repetitions, arXiv 2201.09865; as diffusers'
        inpainting pipelines do with a UNet of 4 channels). None keeps nothing.
      strength: in (0, 1], the share of the steps that is made; 1 begins at noise alone.
    """

    latents: Latents
    kept: Float[AnyArray, "kept_batch height width 1"] | None = None
    strength: float = 1.0


def first_step(steps: int, strength: float) -> int:
    """Which of `steps` is the first one made: the last int(steps * strength) are.

    Raises:
      UserError: `strength` is outside (0, 1], or so small that no step is left.
    """
    made = int(steps * strength) if 0 < strength <= 1 else 0
    if not made:
        raise UserError(
            f"strength is {strength} of {steps} steps; choose a share of 1 step or "
            f"more: {1 / steps:.3g} to 1"
        )
    return steps - made


def step_noise(
    keys: Key[Array, "batch"], step: IntScalar, shape: tuple[int, ...]
) -> Float[Array, "batch height width channels"]:
    """The fresh noise of one ancestral step, [B, *shape]; a row depends on its own key alone."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)

    return jax.vmap(draw)(keys)


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
    """Clean latents from noise; the module's docstring has the update.

    Args:
      denoise_fn: (z_t [B, h, w, c] float32, t [B] int32, or float32 where timesteps have fractions)
        -> prediction of the schedule's type.
      schedule: the one the denoiser was trained with. Zero terminal SNR is met only where the
        spacing begins at the last timestep: `trailing` or `linspace`.
      noise: standard normal, whatever the sampler and spacing.
      steps: number of denoiser calls; static.
      spacing: see `sampling_timesteps`; static.
      sampler: one of `SAMPLERS`; static.
      keys: for `euler_a`, which draws noise at every step: a key for each of the latents, so that a
        image does not depend on its batch. The others draw nothing and use no key.
      known: latents to draw over; None draws from noise alone. Its `strength` is static.

    Returns:
      Clean latents, float32.

    Raises:
      UserError: see `sampling_timesteps` and `first_step`.
      ValueError: `euler_a` without keys.
    """
    chosen, spacing = _sampler_named(sampler), _as_spacing(spacing)
    first = 0 if known is None else first_step(steps, known.strength)
    visited = sampling_timesteps(schedule.timesteps, steps, spacing, sampler)[first:]
    alpha, sigma = (
        jnp.append(level, end) for level, end in zip(_levels(schedule, visited), (1.0, 0.0))
    )
    coefficients, alpha_next = chosen.coefficients(alpha, sigma), alpha[1:]
    if chosen.steps_back:
        back = visited - schedule.timesteps // steps
        abar = jnp.asarray(schedule.alphas_cumprod)
        abar = jnp.where(
            back >= 0, abar[np.maximum(back, 0)], 1.0 if spacing.set_alpha_to_one else abar[0]
        )
        alpha_next, coefficients = jnp.sqrt(abar), _Coefficients(kept=jnp.sqrt(1 - abar))
    if coefficients.fresh is not None and keys is None:
        raise ValueError(
            f"sampler {sampler!r} draws noise at every step; pass keys, one for each "
            "of the latents: jax.random.split(key, len(noise))"
        )

    def step(carry, now):
        latents, x0_before = carry
        number, timestep, here, there, alpha_next, (kept, fresh, correction) = now
        prediction = denoise_fn(latents, jnp.full((latents.shape[0],), timestep))
        x0 = schedule.x0_at(prediction, latents, *here)
        latents = alpha_next * x0 + kept * schedule.epsilon_at(prediction, latents, *here)
        if correction is not None:
            latents += correction * (x0 - x0_before)
        if fresh is not None and keys is not None:
            latents += fresh * step_noise(keys, number, latents.shape[1:])
        if known is not None and known.kept is not None:
            noised = there[0] * known.latents + there[1] * noise
            latents = known.kept * noised + (1 - known.kept) * latents
        return (latents, x0), None

    start = jnp.asarray(noise, jnp.float32)
    if known is not None and first:
        start = alpha[0] * known.latents + sigma[0] * start
    elif chosen.starts_without_signal and spacing.name != "leading":
        start = sigma[0] * start
    table = (
        jnp.arange(first, steps),
        jnp.asarray(visited),
        (alpha[:-1], sigma[:-1]),
        (alpha[1:], sigma[1:]),
        alpha_next,
        coefficients,
    )
    (latents, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), table)
    return latents
