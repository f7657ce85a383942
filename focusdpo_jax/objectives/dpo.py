"""Diffusion-DPO (arXiv 2311.12908), with uniform weights or weighted by the prior mask."""

from focusdpo_jax.focus import losses
from focusdpo_jax.objectives.base import (
    GeneratorObjective,
    prior_weights,
    register,
    uniform_weights,
)


def preference_loss(chosen, rejected, config):
    """Computes weighted Diffusion-DPO plus `config.anchor` times the anchor; see `focus.losses`.

    Fields of `config`:
      beta, loser_limit, anchor: see `focus.losses`.
      match_beta: divides beta by `losses.relative_scale`.
      anchor_fades: multiplies the anchor by `losses.preference_slope`.
      preserve_winner: multiplies the gradient of the rejected image by
        `losses.winner_preserving_scale`.
    """
    beta, rejected_error, more = config.beta, rejected.policy, {}
    if config.match_beta:
        scale = (
            losses.relative_scale(chosen.weights, chosen.prior)
            + losses.relative_scale(rejected.weights, rejected.prior)
        ) / 2
        beta, more = beta / scale, {"relative_scale": scale}
    if config.preserve_winner:
        scale = losses.winner_preserving_scale(
            chosen.residual, rejected.residual, chosen.weights, rejected.weights
        )
        rejected_error = losses.scale_gradient(rejected.policy, scale[:, None, None])
        more |= {"loser_scale": scale}
    loss, diagnostics = losses.diffusion_dpo(
        chosen.policy,
        chosen.reference,
        rejected_error,
        rejected.reference,
        chosen.weights,
        rejected.weights,
        beta,
        config.loser_limit,
    )
    diagnostics |= more
    if config.anchor:
        term, more = losses.anchor(chosen.policy, chosen.reference, config.beta)
        if config.anchor_fades:
            term *= losses.preference_slope(diagnostics["margin"], beta)
        loss, diagnostics = loss + config.anchor * term, diagnostics | more
    return loss, diagnostics


DPO = register(
    GeneratorObjective(
        name="dpo",
        title="Diffusion-DPO",
        weights=uniform_weights,
        loss=preference_loss,
        reads_rejected=True,
        needs_reference=True,
    )
)

PRIOR_DPO = register(
    GeneratorObjective(
        name="prior_dpo",
        title="DPO on the area where a pair differs",
        weights=prior_weights,
        loss=preference_loss,
        reads_rejected=True,
        needs_reference=True,
    )
)
