"""Supervised fine-tuning on chosen images, with uniform weights or weighted by subject masks."""

from focusdpo_jax.focus import losses
from focusdpo_jax.objectives.base import (
    GeneratorObjective,
    prior_weights,
    register,
    uniform_weights,
)


def _loss(chosen, rejected, config):
    del rejected, config
    return losses.sft(chosen.policy, chosen.weights)


SFT = register(
    GeneratorObjective(
        name="sft",
        title="supervised fine-tuning on chosen images",
        weights=uniform_weights,
        loss=_loss,
        reads_rejected=False,
    )
)

SUBJECT_SFT = register(
    GeneratorObjective(
        name="subject_sft",
        title="supervised fine-tuning on chosen images, subjects weighted",
        weights=prior_weights,
        loss=_loss,
        reads_rejected=False,
    )
)
