"""PatchDPO (arXiv 2412.03177): denoising errors of both images, weighted by patch quality."""

import jax.numpy as jnp

from focusdpo_jax.focus import losses, weighting
from focusdpo_jax.objectives.base import GeneratorObjective, register


def _weights(inputs):
    pair = jnp.stack(weighting.quality_weights(inputs.quality.astype(jnp.float32)), axis=1)
    return pair.reshape(-1, *pair.shape[2:]), {}


def _loss(chosen, rejected, config):
    del config
    return losses.patch_dpo(chosen.policy, rejected.policy, chosen.weights, rejected.weights)


PATCH_DPO = register(
    GeneratorObjective(
        name="patch_dpo",
        title="PatchDPO",
        weights=_weights,
        loss=_loss,
        reads_rejected=True,
        needs_quality=True,
    )
)
