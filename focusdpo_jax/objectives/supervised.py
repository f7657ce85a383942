"""Supervised fine-tuning: the denoising error of the chosen images, uniform or on subjects."""

from focusdpo_jax.focus import losses, weighting
from focusdpo_jax.objectives.base import GeneratorObjective, register


def _loss(chosen, rejected, config):
    del rejected, config
    return losses.sft(chosen.policy, chosen.weights)


SFT = register(
    GeneratorObjective(
        name="sft",
        title="supervised fine-tuning on chosen images",
        weights=lambda inputs: (weighting.uniform_weights(inputs.prior), {}),
        loss=_loss,
        reads_rejected=False,
    )
)

SUBJECT_SFT = register(
    GeneratorObjective(
        name="subject_sft",
        title="supervised fine-tuning on chosen images, subjects weighted",
        weights=lambda inputs: (
            weighting.prior_weights(inputs.prior, inputs.params.background),
            {},
        ),
        loss=_loss,
        reads_rejected=False,
    )
)
