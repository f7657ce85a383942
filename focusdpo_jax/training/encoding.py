"""Precomputed frozen-encoder features for a batch of pairs.

A step reads latents, reference features and maps on the latent grid, not images. `encoder` returns
the function that computes them. `cached` runs it over a data set and keeps the result in memory for
all epochs. Values are not rounded, so that training on them equals training on the images.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from focusdpo_jax import compiling, objectives
from focusdpo_jax.array_types import AnyArray
from focusdpo_jax.focus import complexity, correspondence
from focusdpo_jax.focus.grids import average_to_grid, nearest_on_grid
from focusdpo_jax.models.generator import TRAINABLE, ImageView
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training.sources import masks_on_grid


@flax.struct.dataclass
class EncodedPairs:
    """B encoded pairs with S reference slots, the input of the loss.

    The latent grid is h x w, the grid of image-encoder patches g x g.

    Attributes:
      latents_mean, latents_deviation: [B, 2, h, w, C], posterior of (chosen, rejected); [B, 1, h,
        w, C] with chosen only if the run never reads rejected images.
      token_ids: int [B, 2, L], tokens of the caption for each text encoder.
      text, pooled: [B, L, D] and [B, P], text embeddings of the caption; None if the
        text encoders are trained (`text_is_frozen`).
      time_ids: [B, 6], SDXL's size conditioning.
      references: ImageView [B, S], image-encoder features of every reference.
      present: bool [B, S], which slots have a reference.
      prior: [B, h, w], M_prior as the covered share of each location; the mask of all subjects if
        the objective is supervised.
      prototypes: [B, K, S, 2, P, D], prototypes of each subject and of its surroundings for each
        of K buckets, for a source that compares them with features of the step.
      similarity: [B, 2, S + 1, g, g], similarity of the patches of (chosen, rejected) with each
        subject and, last, with the surroundings of all, for a source that does not depend on the
        step.
      area: [B, S], share of the image that each subject covers inside M_prior.
      subject_masks: [B, S, h, w], share of each location that each subject covers in the chosen
        image.
      detail: [B, 2, h, w], M_d of (chosen, rejected).
      quality: [B, h, w], PatchDPO's patch quality of the rejected image, in [0, 1].
      index: [B], positions in the data set.

    The six fields before `index` are None if the objective does not use them.
    """

    latents_mean: Float[AnyArray, "batch images height width channels"]
    latents_deviation: Float[AnyArray, "batch images height width channels"]
    token_ids: Int[AnyArray, "batch 2 length"]
    text: Float[AnyArray, "batch length width"] | None
    pooled: Float[AnyArray, "batch pooled"] | None
    time_ids: Float[AnyArray, "batch 6"]
    references: ImageView
    present: Bool[AnyArray, "batch slots"]
    prior: Float[AnyArray, "batch height width"]
    prototypes: Float[AnyArray, "batch buckets slots 2 prototypes features"] | None
    similarity: Float[AnyArray, "batch 2 slots+1 grid grid"] | None
    area: Float[AnyArray, "batch slots"] | None
    subject_masks: Float[AnyArray, "batch slots height width"] | None
    detail: Float[AnyArray, "batch 2 height width"] | None
    quality: Float[AnyArray, "batch height width"] | None
    index: Int[AnyArray, " batch"]


def learns_from_chosen_alone(config):
    """Returns whether a run never reads rejected images."""
    return not (objectives.get(config.objective).reads_rejected or config.rejected_share)


def text_is_frozen(config):
    """Returns whether the text encoders are frozen, so that captions can be encoded once."""
    return not TRAINABLE[config.trainable](("text_encoder", "kernel"))


def encoder(generator, config, source=None, *, dpce=False, quality=False):
    """Returns the jitted function (parameters, PreferenceBatch) -> EncodedPairs.

    Args:
      generator: a Generator.
      config: the `RunConfig`.
      source: source of SPAF's similarity, from `sources.make_source`; None without SPAF.
      dpce, quality: whether to compute the maps of DPCE and PatchDPO.
    """
    supervised = not objectives.get(config.objective).reads_rejected
    chosen_alone = learns_from_chosen_alone(config)

    def encode(parameters, batch):
        images = [batch.chosen] if chosen_alone else [batch.chosen, batch.rejected]
        pair = jnp.stack(images, axis=1).astype(jnp.float32) / 255
        flat = pair.reshape(-1, *pair.shape[2:])

        def grouped(x):
            """Reshapes [B * P, ...] to [B, P, ...]."""
            return x.reshape(-1, len(images), *x.shape[1:])

        # One image of each pair at a time, which halves the memory of the float32 encoder.
        mean, deviation = (
            jnp.moveaxis(x, 0, 1)
            for x in jax.lax.map(
                functools.partial(generator.encode_latents, parameters), jnp.moveaxis(pair, 1, 0)
            )
        )
        prior_mask = batch.masks.any(1) if supervised else batch.prior_mask
        grid = mean.shape[2], mean.shape[3]
        prior = average_to_grid(prior_mask.astype(jnp.float32), grid)
        references = generator.encode_reference(
            parameters, batch.references.astype(jnp.float32) / 255
        )
        text = pooled = None
        if text_is_frozen(config):
            text, pooled = generator.encode_text(parameters, batch.token_ids)
        prototypes = similarity = area = subject_masks = detail = rejected_quality = None
        if source is not None:
            prototypes, similarity = source.encode(parameters, batch, flat, references)
            similarity = None if similarity is None else grouped(similarity)
            area = (batch.masks & batch.prior_mask[:, None]).mean((2, 3), dtype=jnp.float32)
            subject_masks = average_to_grid(batch.masks.astype(jnp.float32), grid)
        if dpce:
            detail = grouped(_detail(config.focus, batch, flat, prior))
        if quality:
            rejected_quality = patch_quality(
                generator, parameters, batch, pair[:, 1], references, grid
            )
        return EncodedPairs(
            latents_mean=mean,
            latents_deviation=deviation,
            token_ids=batch.token_ids,
            text=text,
            pooled=pooled,
            time_ids=batch.time_ids,
            references=references,
            present=batch.present,
            prior=prior,
            prototypes=prototypes,
            similarity=similarity,
            area=area,
            subject_masks=subject_masks,
            detail=detail,
            quality=rejected_quality,
            index=batch.index,
        )

    return jax.jit(encode, compiler_options=compiling.default_network_options())


def _detail(focus, batch, images, prior):
    """Returns M_d [2B, h, w] of a batch's images [2B, H, W, 3] in [0, 1]."""
    settings = focus.detail_bins, focus.detail_sigma, focus.detail_colour
    detail = complexity.complexity(images, jnp.repeat(prior, 2, axis=0), *settings)
    if not focus.reference_detail:
        return detail
    complexities = complexity.reference_complexity(
        batch.references.astype(jnp.float32) / 255, batch.reference_masks, *settings
    )
    masks = average_to_grid(batch.masks.astype(jnp.float32), prior.shape[1:])
    of_subjects = (jnp.repeat(x, 2, axis=0) for x in (masks, complexities, batch.present))
    return complexity.scale_by_reference(detail, *of_subjects)


def patch_quality(generator, parameters, batch, rejected, references, grid):
    """Returns PatchDPO's patch quality [B, h, w] of rejected images, in [0, 1].

    Args:
      generator: a Generator; its frozen image encoder computes the patch features.
      parameters: {part: tree} with the image encoder.
      batch: PreferenceBatch.
      rejected: the rejected images, [B, H, W, 3] in [0, 1].
      references: ImageView [B, S].
      grid: (h, w), the latent grid.
    """
    side = generator.patch_grid
    features = generator.encode_reference(parameters, rejected).features[:, 1:]
    quality = correspondence.patch_quality(
        references.features[:, :, 1:],
        masks_on_grid(batch.reference_masks, (side, side)),
        features.reshape(-1, side, side, features.shape[-1]),
        batch.present,
    )
    return nearest_on_grid(quality, grid)


class EncodedSource:
    """An encoded data set in memory; it can be indexed by one position or by an array of them."""

    def __init__(self, encoded):
        """Initialises it with the EncodedPairs of the whole data set, as numpy arrays."""
        self.encoded = encoded

    def __len__(self):
        return len(self.encoded.prior)

    def __getitem__(self, index):
        return jax.tree.map(lambda x: x[index], self.encoded)


def in_memory(records):
    """Returns the EncodedSource of a sequence of encoded records."""
    if isinstance(records, EncodedSource):
        return records
    return EncodedSource(
        jax.tree.map(lambda *rows: np.stack(rows), *(records[i] for i in range(len(records))))
    )


def cached(encode, parameters, batches, count):
    """Encodes a data set once, and returns it as an `EncodedSource` in memory.

    Args:
      encode: from `encoder`.
      parameters: {part: tree}, the first argument of `encode`.
      batches: iterable of PreferenceBatch of one size; rows of index -1 are padding and dropped.
      count: number of records of the data set.
    """
    parts, progress = [], ItemProgress("pairs encoded", count)
    for batch in batches:
        keep = np.asarray(batch.index) >= 0
        encoded = meshes.fetch(encode(parameters, batch))
        parts.append(jax.tree.map(lambda x, keep=keep: x[keep], encoded))
        progress.add(int(keep.sum()))
    whole = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    size = sum(x.nbytes for x in jax.tree.leaves(whole)) / 2**20
    logging.info("encoded %d pairs once, %.0f MiB in memory", len(whole.prior), size)
    return EncodedSource(whole)
