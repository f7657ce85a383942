"""The noise schedule of a discrete-time diffusion, and the prediction types of denoisers.

    z_t = alpha_t z + sigma_t e,    alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)

    prediction     target p                z from p                      e from p
    epsilon        e                       (z_t - sigma_t p) / alpha_t   p
    v_prediction   alpha_t e - sigma_t z   alpha_t z_t - sigma_t p       alpha_t p + sigma_t z_t
    sample         z                       p                             (z_t - alpha_t p) / sigma_t

Sources: Ho et al. 2020, arXiv 2006.11239; v: Salimans & Ho 2022, arXiv 2202.00512. All computations
are in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from focusdpo_jax.array_types import AnyArray
from focusdpo_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Signal level of each timestep, and the prediction type of the denoiser.

    It is a pytree, so that a jitted function can take it as an argument.

    Attributes:
      alphas_cumprod: abar_t in [0, 1], decreasing, float32, one for each training timestep.
      prediction_type: one of `PREDICTION_TYPES`.
    """

    alphas_cumprod: Float[AnyArray, "timesteps"]
    prediction_type: str = dataclasses.field(metadata={"static": True})

    @property
    def timesteps(self) -> int:
        """Number of training timesteps T; t is in [0, T)."""
        return self.alphas_cumprod.shape[0]

    def signal_and_noise(
        self, t: Int[AnyArray, "batch"]
    ) -> tuple[Float[Array, "batch 1 1 1"], Float[Array, "batch 1 1 1"]]:
        """Returns alpha_t and sigma_t, each [B, 1, 1, 1]."""
        abar = jnp.asarray(self.alphas_cumprod)[t][:, None, None, None]
        return jnp.sqrt(abar), jnp.sqrt(1 - abar)

    def add_noise(
        self,
        latents: Float[AnyArray, "batch height width channels"],
        noise: Float[AnyArray, "batch height width channels"],
        t: Int[AnyArray, "batch"],
    ) -> Float[Array, "batch height width channels"]:
        """Computes the noisy latents z_t = alpha_t z + sigma_t e."""
        alpha, sigma = self.signal_and_noise(t)
        return alpha * latents.astype(jnp.float32) + sigma * noise.astype(jnp.float32)

    def target(
        self,
        latents: Float[AnyArray, "batch height width channels"],
        noise: Float[AnyArray, "batch height width channels"],
        t: Int[AnyArray, "batch"],
    ) -> Float[Array, "batch height width channels"]:
        """Computes the prediction of a perfect denoiser for z_t."""
        latents, noise = jnp.asarray(latents, jnp.float32), jnp.asarray(noise, jnp.float32)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self.signal_and_noise(t)
        return alpha * noise - sigma * latents

    def to_x0(
        self,
        prediction: Float[AnyArray, "batch height width channels"],
        noisy: Float[AnyArray, "batch height width channels"],
        t: Int[AnyArray, "batch"],
    ) -> Float[Array, "batch height width channels"]:
        """Computes the clean latents that a prediction for `noisy` = z_t implies."""
        return self.x0_at(prediction, noisy, *self.signal_and_noise(t))

    def to_epsilon(
        self,
        prediction: Float[AnyArray, "batch height width channels"],
        noisy: Float[AnyArray, "batch height width channels"],
        t: Int[AnyArray, "batch"],
    ) -> Float[Array, "batch height width channels"]:
        """Computes the noise that a prediction for `noisy` = z_t implies."""
        return self.epsilon_at(prediction, noisy, *self.signal_and_noise(t))

    def x0_at(
        self,
        prediction: Float[AnyArray, "batch height width channels"],
        noisy: Float[AnyArray, "batch height width channels"],
        alpha: Float[Array, "..."],
        sigma: Float[Array, "..."],
    ) -> Float[Array, "batch height width channels"]:
        """Like `to_x0`, for given alpha and sigma of broadcastable shapes."""
        prediction = jnp.asarray(prediction, jnp.float32)
        noisy = jnp.asarray(noisy, jnp.float32)
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / alpha
        return alpha * noisy - sigma * prediction

    def epsilon_at(
        self,
        prediction: Float[AnyArray, "batch height width channels"],
        noisy: Float[AnyArray, "batch height width channels"],
        alpha: Float[Array, "..."],
        sigma: Float[Array, "..."],
    ) -> Float[Array, "batch height width channels"]:
        """Like `to_epsilon` for given alpha and sigma; see `x0_at`."""
        prediction = jnp.asarray(prediction, jnp.float32)
        noisy = jnp.asarray(noisy, jnp.float32)
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return (noisy - alpha * prediction) / sigma
        return alpha * prediction + sigma * noisy


def _rescale_to_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales alpha_t so that the last is 0 and the first keeps its value.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    arXiv 2305.08891, section 3.1.
    """
    alpha = np.sqrt(alphas_cumprod)
    return np.square((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]))


def scaled_linear_schedule(
    prediction_type: str = "epsilon",
    *,
    timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Returns the schedule of Stable Diffusion and SDXL, whose sqrt(beta_t) is linear in t.

        sqrt(beta_t) from sqrt(beta_start) to sqrt(beta_end),   abar_t = prod_(s <= t) (1 - beta_s)

    The defaults are those of SDXL's published `scheduler_config.json`.

    Args:
      prediction_type: one of `PREDICTION_TYPES`.
      timesteps: number of training timesteps.
      beta_start, beta_end: 0 < beta_start < beta_end < 1.
      zero_terminal_snr: whether to rescale so that the last timestep is pure noise (arXiv
        2305.08891).

    Raises:
      UserError: unknown prediction type, or zero terminal SNR with `epsilon`, which does not
        determine the image at the last timestep.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}"
        )
    if zero_terminal_snr and prediction_type == "epsilon":
        raise UserError(
            "prediction_type is 'epsilon', which a schedule with zero terminal SNR "
            "cannot use; choose v_prediction or sample"
        )
    betas = np.square(np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), timesteps))
    alphas_cumprod = np.cumprod(1 - betas)  # In float64; rounded once, at the end.
    if zero_terminal_snr:
        alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(alphas_cumprod.astype(np.float32), prediction_type)


def logit_normal_timesteps(
    key: PRNGKeyArray, batch: int, timesteps: int, mean: float = 0.0, deviation: float = 1.0
) -> Int[Array, "batch"]:
    """Samples timesteps t = T sigmoid(n) with normal n, which favours the middle of the range.

    Source: Esser et al. 2024, arXiv 2403.03206, section 3.1.

    Args:
      key: PRNG key.
      batch: number of samples.
      timesteps: number of training timesteps T.
      mean: mean of n; the median timestep is T sigmoid(mean).
      deviation: standard deviation of n, > 0.
    """
    share = jax.nn.sigmoid(mean + deviation * jax.random.normal(key, (batch,)))
    return jnp.minimum(share * timesteps, timesteps - 1).astype(jnp.int32)
