"""MaPO, margin-aware preference optimisation without a reference model.

Source: Hong et al. 2024, arXiv 2406.06424.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.focus import losses
from focusdpo_jax.objectives.base import (
    Diagnostics,
    GeneratorObjective,
    register,
    uniform_weights,
)

_SNR = 0.5  # The paper's constant for the signal-to-noise ratio in the odds.
_TIMESTEPS = 1000  # T, by which the log odds are multiplied.


def mapo_loss(
    chosen: Float[Array, "batch"], rejected: Float[Array, "batch"], beta: float
) -> tuple[Float[Array, "batch"], Diagnostics]:
    """Computes MaPO's loss: the chosen image's denoising error plus a term of the log odds.

        f(d) = s d / (exp(s d) - 1)                      s = 0.5
        loss = d^w - beta log sigmoid(T (f(d^w) - f(d^l)))

    This is the loss of the authors' public training code, where beta is 0.1.

    Args:
      chosen, rejected: mean squared errors of the trained model, > 0.
      beta: weight of the margin, > 0.

    Returns:
      The loss of each pair [B], and per-pair diagnostics [B]: `winner_error`, `loser_error` and
      `implicit_accuracy`, 1 where the chosen image has the smaller error.
    """

    def odds(error):
        scaled = _SNR * error
        return scaled / jnp.expm1(scaled)

    log_odds = odds(chosen) - odds(rejected)
    loss = chosen - beta * jax.nn.log_sigmoid(_TIMESTEPS * log_odds)
    diagnostics = {
        "winner_error": chosen,
        "loser_error": rejected,
        "implicit_accuracy": (chosen < rejected).astype(chosen.dtype),
    }
    return loss, jax.lax.stop_gradient(diagnostics)


def _loss(chosen, rejected, config):
    return mapo_loss(
        losses.weighted_mean(chosen.weights, chosen.policy),
        losses.weighted_mean(rejected.weights, rejected.policy),
        config.beta,
    )


MAPO = register(
    GeneratorObjective(
        name="mapo",
        title="MaPO",
        weights=uniform_weights,
        loss=_loss,
        reads_rejected=True,
    )
)
