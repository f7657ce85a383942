"""SPAF, the Structure-Preserving Attention Field: locates where an image matches its references.

    reference patches --mask, pool--> prototypes of each subject, and
    of its surroundings                                                  `prototypes`
    best prototype . target patch, cosine --> similarity of every patch  `cosine_similarity`
    a patch belongs to its most similar subject; each subject keeps the
    k = rho * area patches that resemble it most clearly; the union over
    subjects is M'                                                       `match`
    M_s = M_prior and not M'                                             `unmatched`

M' gets low priority in the loss. M_s, the part of the subjects that does not correspond yet, gets
high priority. As denoising proceeds rho grows, so that M' grows and M_s shrinks. The pipeline from
masked pooling to M' and M_s is [known] (FocusDPO, arXiv 2509.01181, pipeline figure, panel a).
Multiple prototypes per subject, the competition between subjects and with the references'
backgrounds, ranking by margin, k as a share of the subject's area, and the choice of features are
[ours]. `experiments/correspondence.py` measures their effect on photographs.

Shapes: B examples, S subject slots (absent ones are masked by `present`), N reference patches,
P prototypes, D features, and target patches h x w. All shapes are static. k depends on the data, so
the best k patches are selected by rank instead of a top-k of static length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focusdpo_jax.array_types import AnyArray, Scalar
from focusdpo_jax.focus.grids import nearest_on_grid

_ROUNDING = 1e-5  # Cosines that differ by less count as equal, because of rounding in float32.
_AREA_ROUNDING = 1e-3  # Areas in patches that differ by less count as equal.


class Match(NamedTuple):
    """The target patches that correspond to a reference.

    Attributes:
      subjects: 1 where the patch matches the subject, else 0.
      union: M', 1 where the patch matches any subject.
      budget: number of patches of this grid that may match, the sum of k over present subjects.
    """

    subjects: Float[Array, "batch subjects height width"]
    union: Float[Array, "batch height width"]
    budget: Float[Array, "batch"]


def _unit(vectors: AnyArray) -> Array:
    """Normalises vectors to length 1 along the last axis; zero vectors stay zero."""
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return jnp.asarray(vectors) * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1))


def prototypes(
    reference_features: Float[AnyArray, "batch subjects patches features"],
    reference_masks: Float[AnyArray, "batch subjects patches"],
    present: Bool[AnyArray, "batch subjects"],
    count: int = 1,
    iterations: int = 8,
) -> Float[Array, "batch subjects count features"]:
    """Computes prototypes of each subject: normalised means over groups of its patch features.

        prototype_sp = unit(sum_n mask_sn [n in group p] f_sn)

    A single prototype is the masked mean of all patches [known]. Multiple prototypes are computed
    by spherical k-means from farthest-first seeds, which is deterministic: the parts of a subject
    differ, and a target patch shows one of them [ours].

    Args:
      reference_features: patch features of each subject's reference image, any float type.
      reference_masks: share of each patch that the subject covers, in [0, 1].
      present: which slots contain a subject.
      count: prototypes per subject, >= 1.
      iterations: iterations of k-means.

    Returns:
      float32 vectors of length 1; zeros for an absent subject and for one whose mask is empty.
    """
    # `where` instead of a product with zero: an unused slot may contain NaN.
    features = jnp.where(present[..., None, None], reference_features.astype(jnp.float32), 0)
    masks = jnp.where(present[..., None], reference_masks.astype(jnp.float32), 0)
    weighted, directions = masks[..., None] * features, _unit(features)
    centres = _unit(jnp.sum(weighted, axis=2, keepdims=True))
    if count == 1:
        return centres

    def cosine(centres):
        return jnp.einsum(
            "bsnd,bspd->bsnp", directions, centres, precision=jax.lax.Precision.HIGHEST
        )

    for _ in range(count - 1):
        nearest = jnp.where(masks > 0.5, jnp.max(cosine(centres), axis=-1), jnp.inf)
        seed = jnp.argmin(nearest, axis=-1)[..., None, None]
        seeds = jnp.take_along_axis(directions, seed, axis=2)
        # The mean is repeated if every patch of the subject equals a seed, or if there is none:
        # the choice of a further seed would depend on rounding, which differs between devices.
        new = (jnp.min(nearest, axis=-1) < 1 - _ROUNDING)[..., None, None]
        centres = jnp.concatenate([centres, jnp.where(new, seeds, centres[:, :, :1])], axis=2)

    def step(centres, _):
        group = jax.nn.one_hot(jnp.argmax(cosine(centres), axis=-1), count)
        sums = jnp.einsum("bsnp,bsnd->bspd", group, weighted)
        # A group without patches keeps its centre.
        return jnp.where(jnp.any(sums != 0, axis=-1, keepdims=True), _unit(sums), centres), None

    return jax.lax.scan(step, centres, length=iterations)[0]


def subject_and_background_prototypes(
    reference_features: Float[AnyArray, "batch subjects patches features"],
    reference_masks: Float[AnyArray, "batch subjects patches"],
    present: Bool[AnyArray, "batch subjects"],
    count: int,
) -> Float[Array, "batch subjects 2 count features"]:
    """Computes `prototypes` of each subject, then of its surroundings in its reference image."""
    return jnp.stack(
        [
            prototypes(reference_features, masks, present, count)
            for masks in (reference_masks, 1 - reference_masks)
        ],
        axis=2,
    )


def cosine_similarity(
    prototype: Float[AnyArray, "batch subjects count features"],
    target_features: Float[AnyArray, "batch height width features"],
) -> Float[Array, "batch subjects height width"]:
    """Computes the cosine of every target patch with each subject's nearest prototype, in [-1, 1].

    It is -1 for a subject without prototypes, such as an absent one.
    """
    target = _unit(target_features.astype(jnp.float32))
    # Full precision, since competition and rank compare numbers that are close together.
    cosine = jnp.einsum(
        "bspd,bhwd->bsphw",
        prototype.astype(jnp.float32),
        target,
        precision=jax.lax.Precision.HIGHEST,
    )
    known = jnp.any(prototype != 0, axis=-1)
    return jnp.max(jnp.where(known[..., None, None], cosine, -1), axis=2)


def patch_quality(
    reference_features: Float[AnyArray, "batch subjects patches features"],
    reference_masks: Float[AnyArray, "batch subjects patches"],
    target_features: Float[AnyArray, "batch height width features"],
    present: Bool[AnyArray, "batch subjects"],
) -> Float[Array, "batch height width"]:
    """Computes PatchDPO's quality: similarity of each target patch with the best reference patch.

        q[i] = max over subjects s and their patches n of cosine(f_sn, f_i), at least 0

    Unlike in SPAF, reference patches are not pooled to prototypes. A reference patch is used if its
    subject covers most of it. PatchDPO (arXiv 2412.03177) estimates quality by features of a frozen
    vision model.

    Args:
      reference_features, reference_masks, present: see `prototypes`.
      target_features: patch features of the images to rate, by the same model.

    Returns:
      Quality in [0, 1]; 0 without a subject.
    """
    usable = present[..., None] & (reference_masks > 0.5)
    references = jnp.where(usable[..., None], reference_features.astype(jnp.float32), 0)
    cosine = jnp.einsum(
        "bsnd,bhwd->bsnhw", _unit(references), _unit(target_features.astype(jnp.float32))
    )
    # Unusable patches have a cosine of 0, which is the least that counts.
    return jnp.clip(jnp.max(cosine, axis=(1, 2)), 0, 1)


def budget(
    area: Float[AnyArray, "batch subjects"],
    present: Bool[AnyArray, "batch subjects"],
    rho: Scalar,
    patches: int,
) -> Int[Array, "batch subjects"]:
    """Computes the number of patches each subject may match: `k = round(rho * area)` [ours].

    Halves are rounded up. k is at least 1 for a subject with a positive area, at most `patches`,
    and 0 for an absent subject.
    """
    k = jnp.clip(jnp.floor(rho * area + 0.5), 1, patches).astype(jnp.int32)
    return jnp.where(present & (area > 0), k, 0)


def match(
    similarity: Float[AnyArray, "batch subjects height width"],
    present: Bool[AnyArray, "batch subjects"],
    area: Float[AnyArray, "batch subjects"],
    rho: Scalar,
    background: Float[AnyArray, "batch height width"] | None = None,
    coverage: Float[AnyArray, "batch subjects height width"] | None = None,
) -> Match:
    """Computes M' from similarities: competition of subjects, then the best k patches of each.

    1. A patch belongs to the present subject with the largest similarity; if several are equal, to
       each of them, so that the order of the subjects has no effect [ours].
    2. Every subject keeps k of its patches over the whole image [known], with k from `budget`
    [ours].
       These are the patches with the largest margin [ours]: their similarity minus the largest one
       of the rivals, which are the other subjects and the background. Without rivals the margin is
       the similarity. Patches with equal margins are taken in raster order.

    Values are rounded to bins wider than float32's rounding, so that devices with other rounding
    match the same patches, except where a value lies at the edge of a bin.

    With `coverage`, a subject matches only patches that it covers, and the budget is an area: a
    patch on the outline counts as its covered share [ours]. Otherwise a subject covers more patches
    than its area has, and those on the outline remain without a match even if rho is 1.

    Args:
      similarity: from any source: cosine of features, or attention to a subject's tokens.
      present: which slots contain a subject.
      area: size of each subject in the target, in patches of this grid (the sum of its soft mask).
      rho: share of the subject's area to match, >= 0; may be traced.
      background: similarity with the surroundings of the subjects in their references, if
        available.
      coverage: share of each patch that each subject covers in the target, in [0, 1].

    Returns:
      The match. No gradient flows through it.
    """
    batch, subjects, height, width = similarity.shape
    present = jnp.asarray(present)
    score = similarity.astype(jnp.float32).reshape(batch, subjects, height * width)
    score = jnp.where(present[..., None], score, -jnp.inf)
    scale = jnp.max(jnp.where(present[..., None], jnp.abs(score), 0), axis=(1, 2), keepdims=True)
    smallest = _ROUNDING * jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    own = present[..., None] & (score >= jnp.max(score, axis=1, keepdims=True) - smallest)

    others = jnp.where(jnp.eye(subjects, dtype=bool)[:, :, None], -jnp.inf, score[:, None])
    rival = jnp.max(others, axis=2)
    if background is not None:
        rival = jnp.maximum(rival, background.reshape(batch, 1, height * width))
    margin = jnp.round((score - jnp.where(jnp.isfinite(rival), rival, 0)) / smallest)

    if coverage is not None:
        coverage = jnp.asarray(coverage, jnp.float32).reshape(score.shape)
        own &= coverage > 0
    order = jnp.argsort(jnp.where(own, -margin, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)  # The inverse permutation: the rank of each patch.
    if coverage is None:
        k = budget(area, present, rho, height * width)
        kept = own & (rank < k[..., None])
    else:
        k = jnp.where(present, rho * area, 0)
        sorted_coverage = jnp.take_along_axis(jnp.where(own, coverage, 0), order, axis=-1)
        better = jnp.take_along_axis(  # The covered area of all better patches.
            jnp.cumsum(sorted_coverage, axis=-1) - sorted_coverage, rank, axis=-1
        )
        kept = own & (better < k[..., None] - _AREA_ROUNDING)

    kept = kept.reshape(similarity.shape)
    return Match(
        subjects=kept.astype(jnp.float32),
        union=jnp.any(kept, axis=1).astype(jnp.float32),
        budget=jnp.sum(k, axis=1).astype(jnp.float32),
    )


def prototype_similarity(
    described: Float[AnyArray, "batch subjects 2 count features"],
    target_features: Float[AnyArray, "batch height width features"],
) -> tuple[Float[Array, "batch subjects height width"], Float[Array, "batch height width"]]:
    """Computes the similarity of a target with each subject and with all references' backgrounds.

    Args:
      described: from `subject_and_background_prototypes`. Reference and target features must come
        from the same layer (and, for a denoiser, the same noise).
    """
    inside, outside = (cosine_similarity(described[:, :, i], target_features) for i in range(2))
    return inside, jnp.max(outside, axis=1)


def to_grid(match: Match, grid: tuple[int, int]) -> Match:
    """Resamples a match to another grid (h, w), usually the latents', and scales its budget."""
    rows, columns = match.union.shape[-2:]
    return Match(
        subjects=nearest_on_grid(match.subjects, grid),
        union=nearest_on_grid(match.union, grid),
        budget=match.budget * (grid[0] * grid[1] / (rows * columns)),
    )


def inside_own(match: Match, masks: Float[AnyArray, "batch subjects height width"]) -> Match:
    """Keeps only the matches inside the mask of their own subject [ours].

    Without this, a subject with leaked attributes of its neighbour matches the neighbour's
    reference, and gets low priority exactly where attributes have leaked.

    Args:
      match: match on the grid of the masks (see `to_grid`). Its budget is not changed.
      masks: share of each location that each subject covers, in [0, 1].
    """
    subjects = match.subjects * (masks > 0)
    return match._replace(subjects=subjects, union=jnp.max(subjects, axis=1))


def unmatched(
    prior: Float[AnyArray, "batch height width"], matched: Float[AnyArray, "batch height width"]
) -> Float[Array, "batch height width"]:
    """Computes `M_s = M_prior and not M'` [known]: the part of the subjects without a match.

    Args:
      prior: M_prior as the share of each location covered, in [0, 1].
      matched: M', 0 or 1, on the same grid.
    """
    return jnp.asarray(prior * (1 - matched))


def alignment(match: Match, prior: Float[AnyArray, "batch height width"]) -> Float[Array, "batch"]:
    """Computes the alignment score `|M' and M_prior| / min(k, |M_prior|)` [ours].

    Args:
      match: match on the grid of `prior` (see `to_grid`); k is its budget.
      prior: M_prior in [0, 1].

    Returns:
      A score in [0, 1]: 1 if all matches lie on a subject (or cover all subjects), 0 if none do or
      if nothing can match.
    """
    hits = jnp.sum(match.union * prior, axis=(1, 2))
    possible = jnp.minimum(match.budget, jnp.sum(prior, axis=(1, 2)))
    # The ratio may be slightly above one because of soft borders and uneven grids.
    return jnp.minimum(hits / jnp.where(possible > 0, possible, 1), 1)
