"""FocusDPO (arXiv 2509.01181): Diffusion-DPO with spatial weights that depend on the timestep."""

from focusdpo_jax.focus import weighting
from focusdpo_jax.objectives.base import GeneratorObjective, register
from focusdpo_jax.objectives.dpo import preference_loss


def _weights(inputs):
    return weighting.focus_weights(
        inputs.structure,
        inputs.params,
        inputs.prior,
        inputs.match,
        inputs.detail,
        inputs.uncertainty,
    )


FOCUS_DPO = register(
    GeneratorObjective(
        name="focus_dpo",
        title="FocusDPO",
        weights=_weights,
        loss=preference_loss,
        reads_rejected=True,
        needs_reference=True,
        uses_focus=True,
    )
)
