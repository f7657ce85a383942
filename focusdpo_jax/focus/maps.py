"""The main entry point: computes FocusDPO's weight maps of a batch of pairs in one call.

    maps = focus_map(
        images, prior_mask, grid=(128, 128), timesteps=t,
        image_features=..., reference_features=..., reference_masks=..., subject_masks=...,
    )
    loss, _ = diffusion_dpo(..., maps.weights[:, 0], maps.weights[:, 1], beta)

`training` computes the same maps in two parts, since everything that does not depend on the
timestep is computed once for each pair.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focusdpo_jax.array_types import AnyArray
from focusdpo_jax.focus import complexity, confidence, correspondence
from focusdpo_jax.focus.buckets import Bucket, BucketParams, BucketStructure, make_buckets
from focusdpo_jax.focus.correspondence import Match
from focusdpo_jax.focus.grids import average_to_grid, share_on_grid
from focusdpo_jax.focus.weighting import focus_weights

# Masks may be bool, or float in [0, 1] for partly covered locations.
ReferenceMasks = (
    Bool[AnyArray, "batch subjects mask_rows mask_columns"]
    | Float[AnyArray, "batch subjects mask_rows mask_columns"]
)
SubjectMasks = (
    Bool[AnyArray, "batch subjects rows columns"] | Float[AnyArray, "batch subjects rows columns"]
)
PriorMasks = Bool[AnyArray, "batch rows columns"] | Float[AnyArray, "batch rows columns"]


class FocusMap(NamedTuple):
    """The weights of B pairs of P images, and the maps from which they are computed.

    The maps of terms that the bucket excludes are None. No gradient flows through any map.

    Attributes:
      weights: [B, P, h, w], W >= 0 on the latent grid; `losses.weighted_mean` normalises it.
      prior: [B, h, w], M_prior, the share of each location that the prior mask covers.
      similarity: [B, P, S, g, g], cosine of each patch with the nearest prototype of each subject,
        on the grid of the features.
      match: subjects [B, P, S, h, w], union M' [B, P, h, w], and budget [B, P].
      unmatched: [B, P, h, w], M_s.
      detail: [B, P, h, w], M_d.
      uncertainty: [B, P, h, w], U.
      diagnostics: those of `weighting.focus_weights`, each [B, P].
    """

    weights: Float[Array, "batch images height width"]
    prior: Float[Array, "batch height width"]
    similarity: Float[Array, "batch images subjects patch_rows patch_columns"] | None
    match: Match | None
    unmatched: Float[Array, "batch images height width"] | None
    detail: Float[Array, "batch images height width"] | None
    uncertainty: Float[Array, "batch images height width"] | None
    diagnostics: dict[str, Float[Array, "batch images"]]


class _Spaf(NamedTuple):
    """Arguments of `correspondence.match` for N images; `own`: subject masks on the latent grid.

    `coverage`: subject masks on the grid of the features, or None.
    """

    similarity: Array
    background: Array
    present: Array
    area: Array
    own: Array | None
    coverage: Array | None


class _Inputs(NamedTuple):
    """Inputs of the weights of N images; None for terms that the bucket's structure excludes."""

    prior: Array
    spaf: _Spaf | None = None
    detail: Array | None = None
    error: Array | None = None


def focus_map(
    images: Float[AnyArray, "batch images rows columns 3"],
    prior_mask: PriorMasks,
    *,
    grid: tuple[int, int],
    bucket: Bucket | None = None,
    timesteps: Int[AnyArray, "batch"] | None = None,
    buckets: tuple[Bucket, ...] | None = None,
    image_features: Float[AnyArray, "batch images patch_rows patch_columns features"] | None = None,
    reference_features: Float[AnyArray, "batch subjects reference_rows reference_columns features"]
    | None = None,
    reference_masks: ReferenceMasks | None = None,
    present: Bool[AnyArray, "batch subjects"] | None = None,
    subject_masks: SubjectMasks | None = None,
    reference_error: Float[AnyArray, "batch images height width"] | None = None,
    prototypes: int = 32,
    own_subject: bool = False,
    coverage: bool = False,
    detail_bins: int = 16,
    detail_sigma: float = 8.0,
    detail_colour: bool = False,
    reference_images: Float[AnyArray, "batch subjects mask_rows mask_columns 3"] | None = None,
) -> FocusMap:
    """Computes FocusDPO's weight map of each image of a batch of pairs.

    All defaults are those of `configs/sdxl_dpo.py`. The function is pure and can be jitted: `grid`,
    the arguments from `prototypes` on, and the bucket's structure are static.

    The timestep is given in one of two ways. With `bucket`, all pairs are in one timestep range
    (see `buckets.make_buckets`), and terms that the bucket excludes are not computed. With
    `timesteps`, each pair has its own timestep, which may be traced, as in a trainer that samples
    from the whole range. Then all terms of `buckets` are computed.

    Args:
      images: RGB in [0, 1]; P = 2 for (chosen, rejected), or P = 1.
      prior_mask: M_prior in pixels: where chosen and rejected differ, or all subjects.
      grid: (h, w) of the latents, which divides the images.
      bucket: the timestep range of the batch.
      timesteps: timestep in [0, T) of each pair, shared by both images.
      buckets: buckets for `timesteps`; default: `make_buckets()`, 4 ranges of T = 1000.
      image_features: patch features of the images, from any frozen vision model (without class
        tokens) or from a block of a denoiser.
      reference_features: patch features of each subject's reference image, from the same model.
      reference_masks: the subject's pixels in its reference, of any resolution.
      present: which slots contain a subject; default: all.
      subject_masks: each subject's pixels in the images. Their area limits the number of patches
        that may match. Default: the subjects share the prior mask's area equally [ours].
      reference_error: error maps of the reference model (`losses.error_map`), for a bucket with
        lambda_c > 0.
      prototypes: number of prototypes per subject, and also of its surroundings.
      own_subject: whether to keep only matches inside the subject's own mask; needs
        `subject_masks`.
      coverage: whether a subject can match only patches that it covers, each counted by its covered
        share (`correspondence.match`); needs `subject_masks`.
      detail_bins, detail_sigma, detail_colour: arguments of `complexity.local_entropy`; sigma is in
        pixels, by default one latent cell of SDXL.
      reference_images: RGB in [0, 1]. If given, the detail of each subject is multiplied by the
        relative complexity of its reference (`complexity.scale_by_reference`); needs
        `reference_masks` and `subject_masks`.

    Returns:
      A `FocusMap`.

    Raises:
      ValueError: not exactly one of `bucket` and `timesteps` is given, or an argument that the
        bucket's structure needs is missing.
      UserError: the grid does not divide the images.
    """
    structure, params = _bucket(bucket, timesteps, buckets)
    count, sides = images.shape[:2]

    def flat(x):
        """Reshapes [B, P, ...] to [B * P, ...]."""
        return x.reshape(-1, *x.shape[2:])

    def each(x):
        """Repeats [B, ...] for every image of its pair: [B * P, ...]."""
        return jnp.repeat(x, sides, axis=0)

    prior = average_to_grid(prior_mask.astype(jnp.float32), grid)
    inputs = _Inputs(each(prior))
    if structure.spaf:
        if image_features is None or reference_features is None or reference_masks is None:
            raise ValueError(
                "focus_map: SPAF needs image_features, reference_features and reference_masks"
            )
        for name, used in (("own_subject", own_subject), ("coverage", coverage)):
            if used and subject_masks is None:
                raise ValueError(f"focus_map: {name} needs subject_masks")
        slots = reference_features.shape[:2]
        patch_rows, patch_columns = image_features.shape[2:4]
        rows, columns = reference_features.shape[2:4]
        present = jnp.ones(slots, bool) if present is None else jnp.asarray(present)
        references = correspondence.subject_and_background_prototypes(
            reference_features.reshape(*slots, -1, reference_features.shape[-1]),
            share_on_grid(reference_masks, (rows, columns)).reshape(*slots, -1),
            present,
            prototypes,
        )
        similarity, background = correspondence.prototype_similarity(
            each(references), flat(image_features)
        )
        own = covered = None
        if subject_masks is not None and (own_subject or coverage):
            own = average_to_grid(subject_masks.astype(jnp.float32), grid)
            covered = each(share_on_grid(own, (patch_rows, patch_columns))) if coverage else None
            own = each(own)
        # A reference whose mask is empty has no prototypes, and nothing can match it.
        known = jnp.any(references[:, :, 0] != 0, axis=(2, 3))
        area = _area(prior_mask, subject_masks, present) * (patch_rows * patch_columns)
        spaf = _Spaf(similarity, background, each(present & known), each(area), own, covered)
        inputs = inputs._replace(spaf=spaf)
    if structure.dpce:
        settings = detail_bins, detail_sigma, detail_colour
        detail = complexity.complexity(flat(images), inputs.prior, *settings)
        if reference_images is not None:
            if reference_masks is None or subject_masks is None:
                raise ValueError(
                    "focus_map: reference_images needs reference_masks and subject_masks"
                )
            complexities = complexity.reference_complexity(
                reference_images, reference_masks, *settings
            )
            masks = average_to_grid(subject_masks.astype(jnp.float32), grid)
            shown = None if present is None else each(present)
            detail = complexity.scale_by_reference(detail, each(masks), each(complexities), shown)
        inputs = inputs._replace(detail=detail)
    if structure.confidence:
        if reference_error is None:
            raise ValueError("focus_map: lambda_c > 0 needs reference_error")
        inputs = inputs._replace(error=flat(reference_error))

    if timesteps is None:
        maps = _weigh(structure, params, grid, inputs)
    else:

        def one(params, inputs):
            rows = jax.tree.map(lambda x: x[None], inputs)
            return jax.tree.map(lambda x: x[0], _weigh(structure, params, grid, rows))

        maps = jax.vmap(one)(jax.tree.map(each, params), inputs)
    maps = jax.tree.map(lambda x: x.reshape(count, sides, *x.shape[1:]), maps)
    return jax.lax.stop_gradient(maps._replace(prior=prior))


def _bucket(bucket, timesteps, buckets):
    """Returns the structure and the params: scalars, or arrays [B] for timesteps [B]."""
    if (bucket is None) == (timesteps is None):
        raise ValueError("focus_map takes either bucket or timesteps")
    if bucket is not None:
        return bucket
    buckets = make_buckets() if buckets is None else buckets
    terms = [bucket.structure for bucket in buckets]
    if len({term.spaf for term in terms}) > 1:
        raise ValueError("focus_map: with timesteps, all buckets or none have SPAF")
    structure = BucketStructure(
        spaf=any(term.spaf for term in terms),
        dpce=any(term.dpce for term in terms),
        confidence=any(term.confidence for term in terms),
    )
    params = jax.tree.map(lambda *rows: jnp.stack(rows), *(bucket.params for bucket in buckets))
    # A bucket without DPCE is equivalent to one whose gate never opens.
    dpce = jnp.array([term.dpce for term in terms])
    params = params._replace(
        lambda_d=jnp.where(dpce, params.lambda_d, 0), tau=jnp.where(dpce, params.tau, jnp.inf)
    )
    # The first bucket has the largest timesteps.
    index = jnp.sum(timesteps[:, None] < params.t_low[:-1], axis=1)
    return structure, jax.tree.map(lambda x: x[index], params)


def _area(prior_mask, subject_masks, present):
    """Computes the share of the image [B, S] that each subject covers inside the prior mask."""
    prior = prior_mask.astype(jnp.float32)[:, None]
    if subject_masks is not None:
        return jnp.mean(subject_masks.astype(jnp.float32) * prior, axis=(2, 3))
    subjects = jnp.maximum(jnp.sum(present, axis=1, keepdims=True), 1)
    return jnp.where(present, jnp.mean(prior, axis=(2, 3)) / subjects, 0)


def _weigh(
    structure: BucketStructure, params: BucketParams, grid: tuple[int, int], inputs: _Inputs
) -> FocusMap:
    """Computes the `FocusMap` of N images, without the axis of pairs."""
    similarity = match = unmatched = uncertainty = None
    if inputs.spaf is not None:
        similarity, background, present, area, own, coverage = inputs.spaf
        match = correspondence.match(similarity, present, area, params.rho, background, coverage)
        match = correspondence.to_grid(match, grid)
        if own is not None:
            match = correspondence.inside_own(match, own)
        unmatched = correspondence.unmatched(inputs.prior, match.union)
    if inputs.error is not None:
        uncertainty = confidence.uncertainty(inputs.error, inputs.prior)
    weights, diagnostics = focus_weights(
        structure, params, inputs.prior, match, inputs.detail, uncertainty
    )
    return FocusMap(
        weights=weights,
        prior=inputs.prior,
        similarity=similarity,
        match=match,
        unmatched=unmatched,
        detail=inputs.detail,
        uncertainty=uncertainty,
        diagnostics=diagnostics,
    )
