"""What the frozen encoders say of a batch of pairs: everything that can be computed once.

A step needs latents, reference features and maps on the latent grid, not pictures. `encoder` makes
the function that turns the one into the other, and `cached` runs it over a data set and keeps the
result in memory, so that later epochs pay nothing.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from focusdpo_jax.config import SUPERVISED_OBJECTIVES
from focusdpo_jax.focus import complexity
from focusdpo_jax.focus.grids import average_to_grid
from focusdpo_jax.models.generator import ImageView


@flax.struct.dataclass
class EncodedPairs:
    """B pairs with S reference slots, as the loss takes them. Grids: latents h x w, patches g x g.

    Attributes:
      latents_mean, latents_deviation: [B, 2, h, w, C], posterior of (chosen, rejected); where the
        objective is supervised, and learns nothing from rejected, [B, 1, h, w, C] of chosen alone.
      token_ids: int [B, 2, L], the caption for each text encoder.
      time_ids: [B, 6], SDXL's size conditioning.
      references: the image encoder's view [B, S] of every reference.
      present: bool [B, S].
      prior: [B, h, w], M_prior as the share of each location that is covered; where the objective
        is supervised, and nothing is compared, all subjects.
      target_features: [B, 2, g, g, D], the image encoder's view of (chosen, rejected).
      reference_masks: [B, S, N], share of each reference patch that the subject covers.
      area: [B, S], size of each subject inside M_prior, in patches: where nothing was disrupted
        there is nothing to match.
      detail: [B, 2, h, w], M_d of (chosen, rejected).
      index: [B], positions in the data set.

    The last four before `index` are None where the objective does not look at them.
    """

    latents_mean: jax.Array
    latents_deviation: jax.Array
    token_ids: jax.Array
    time_ids: jax.Array
    references: ImageView
    present: jax.Array
    prior: jax.Array
    target_features: jax.Array | None
    reference_masks: jax.Array | None
    area: jax.Array | None
    detail: jax.Array | None
    index: jax.Array


def learns_from_chosen_alone(config):
    """Whether a run never looks at rejected pictures."""
    return config.objective in SUPERVISED_OBJECTIVES and not config.rejected_share


def encoder(generator, config, structures):
    """The jitted function (parameters, PreferenceBatch) -> EncodedPairs.

    Args:
      structures: the bucket structures of the run; what none of them uses is left out.
    """
    spaf = any(structure.spaf for structure in structures)
    dpce = any(structure.dpce for structure in structures)
    supervised = config.objective in SUPERVISED_OBJECTIVES
    chosen_alone = learns_from_chosen_alone(config)

    def encode(parameters, batch):
        images = [batch.chosen] if chosen_alone else [batch.chosen, batch.rejected]
        pair = jnp.stack(images, axis=1).astype(jnp.float32) / 255
        flat = pair.reshape(-1, *pair.shape[2:])

        def grouped(x):
            """[B * P, ...] as [B, P, ...]."""
            return x.reshape(-1, len(images), *x.shape[1:])

        mean, deviation = map(grouped, generator.encode_image(parameters, flat))
        marked = batch.masks.any(1) if supervised else batch.prior_mask
        prior = average_to_grid(marked.astype(jnp.float32), mean.shape[2:4])
        references = batch.references.astype(jnp.float32) / 255
        side = generator.patch_grid
        targets = masks = area = detail = None
        if spaf:
            features = generator.view(parameters, flat).features[:, 1:]
            targets = grouped(features.reshape(-1, side, side, features.shape[-1]))
            masks = average_to_grid(batch.reference_masks.astype(jnp.float32), (side, side))
            masks = masks.reshape(*masks.shape[:2], -1)
            inside = batch.masks & batch.prior_mask[:, None]
            area = average_to_grid(inside.astype(jnp.float32), (side, side)).sum((2, 3))
        if dpce:
            detail = grouped(complexity.complexity(
                flat, jnp.repeat(prior, 2, axis=0), config.focus.detail_bins,
                config.focus.detail_sigma))
        return EncodedPairs(
            latents_mean=mean, latents_deviation=deviation, token_ids=batch.token_ids,
            time_ids=batch.time_ids,
            references=generator.view(parameters, references), present=batch.present, prior=prior,
            target_features=targets, reference_masks=masks, area=area, detail=detail,
            index=batch.index)

    return jax.jit(encode)


class EncodedSource:
    """A data set that was encoded once; a random-access source for the loader."""

    def __init__(self, encoded):
        """`encoded` is an EncodedPairs of numpy arrays over the whole data set."""
        self.encoded = encoded

    def __len__(self):
        return len(self.encoded.prior)

    def __getitem__(self, index):
        return jax.tree.map(lambda x: x[index], self.encoded)


def cached(encode, parameters, batches):
    """Encodes a finite pass over a data set, and keeps it in memory.

    Args:
      encode: from `encoder`.
      batches: iterable of PreferenceBatch of one size; rows of index -1 are padding and dropped.
    """
    parts = []
    for batch in batches:
        keep = np.asarray(batch.index) >= 0
        encoded = jax.device_get(encode(parameters, batch))
        # Features take most of the room, and half precision is what the encoders are kept in.
        parts.append(jax.tree.map(lambda x, keep=keep: half(x)[keep], encoded))
    whole = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    size = sum(x.nbytes for x in jax.tree.leaves(whole)) / 2**20
    logging.info("encoded %d pairs once, %.0f MiB in memory", len(whole.prior), size)
    return EncodedSource(whole)


def half(x):
    """An array as it is kept: features and grids in half precision, all else as it is."""
    return x.astype(np.float16) if x.dtype == np.float32 and x.ndim > 2 else x
