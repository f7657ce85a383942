"""SPAF, the Structure-Preserving Attention Field: where does the image already match a reference?

    reference patches --mask, pool--> one prototype a subject            `prototypes`
    prototype . target patch, cosine  --> similarity of every patch      `cosine_similarity`
    a patch belongs to its most similar subject; each subject keeps its
    k = rho * area best patches; the union over subjects is M'           `match`
    M_s = M_prior and not M'                                             `unmatched`

M' gets low priority in the loss and M_s, the part of the subjects that does not correspond yet,
high priority. As denoising proceeds rho grows, so M' grows and M_s shrinks. The pipeline from
masked pooling to M' and M_s is [known] (FocusDPO, arXiv 2509.01181, pipeline figure, panel a).
The competition between subjects, k as a share of the subject's area, and the choice of features
are [ours].

Shapes: B examples, S subject slots (absent ones are masked by `present`), N reference patches,
D features, and target patches h x w. All of it is fixed-shape: k depends on the data, so the best
k are found by rank and not by a top-k of static length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from focusdpo_jax.focus.grids import nearest_on_grid


class Match(NamedTuple):
    """Which target patches correspond to a reference.

    Attributes:
      subjects: 1 where the patch is among a subject's matches, else 0.
      union: M', 1 where any subject matches.
      budget: how many patches of this grid were asked for, the sum of k over present subjects.
    """

    subjects: Float[Array, "batch subjects height width"]
    union: Float[Array, "batch height width"]
    budget: Float[Array, "batch"]


def _unit(vectors: Array) -> Array:
    """Vectors of length 1 along the last axis; zero stays zero."""
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1))


def prototypes(
    reference_features: Float[Array, "batch subjects patches features"],
    reference_masks: Float[Array, "batch subjects patches"],
    present: Bool[Array, "batch subjects"],
) -> Float[Array, "batch subjects features"]:
    """One direction in feature space for each subject: the masked mean of its patches.

        prototype_s = unit(sum_n mask_sn f_sn / sum_n mask_sn)

    Args:
      reference_features: patch features of each subject's reference image, any float type.
      reference_masks: share of each patch that the subject covers, in [0, 1].
      present: which slots hold a subject.

    Returns:
      float32 vectors of length 1; zeros for an absent subject, whatever its slot holds, and for
      one whose mask is empty.
    """
    masks = reference_masks.astype(jnp.float32)[..., None]
    # Only the direction counts, so the sum stands for the mean.
    pooled = jnp.sum(masks * reference_features.astype(jnp.float32), axis=2)
    # Selected, not multiplied by zero: an unused slot may hold NaN.
    return _unit(jnp.where(present[..., None], pooled, 0))


def cosine_similarity(
    prototype: Float[Array, "batch subjects features"],
    target_features: Float[Array, "batch height width features"],
) -> Float[Array, "batch subjects height width"]:
    """Cosine of the angle between every subject's prototype and every target patch, in [-1, 1]."""
    target = _unit(target_features.astype(jnp.float32))
    # Full precision: competition and rank compare numbers that are close together.
    return jnp.einsum("bsd,bhwd->bshw", prototype, target, precision=jax.lax.Precision.HIGHEST)


def patch_quality(
    reference_features: Float[Array, "batch subjects patches features"],
    reference_masks: Float[Array, "batch subjects patches"],
    target_features: Float[Array, "batch height width features"],
    present: Bool[Array, "batch subjects"],
) -> Float[Array, "batch height width"]:
    """How well each target patch is found on some subject's reference: PatchDPO's quality.

        q[i] = max over subjects s and their patches n of cosine(f_sn, f_i), at least 0

    Every reference patch stands for itself, unlike in SPAF; a patch counts where its subject covers
    most of it. PatchDPO (arXiv 2412.03177) estimates quality by features of a frozen vision model.

    Returns:
      Quality in [0, 1]; 0 without a subject.
    """
    usable = present[..., None] & (reference_masks > 0.5)
    references = jnp.where(usable[..., None], reference_features.astype(jnp.float32), 0)
    cosine = jnp.einsum("bsnd,bhwd->bsnhw", _unit(references),
                        _unit(target_features.astype(jnp.float32)))
    # Unusable patches have a cosine of 0, which is the least that counts.
    return jnp.clip(jnp.max(cosine, axis=(1, 2)), 0, 1)


def budget(
    area: Float[Array, "batch subjects"],
    present: Bool[Array, "batch subjects"],
    rho: Float[Array, ""] | float,
    patches: int,
) -> Int[Array, "batch subjects"]:
    """How many patches each subject may match: `k = round(rho * area)`, halves upwards [ours].

    At least one patch for a subject that covers anything, at most all of them; 0 if absent.
    """
    k = jnp.clip(jnp.floor(rho * area + 0.5), 1, patches).astype(jnp.int32)
    return jnp.where(present & (area > 0), k, 0)


def match(
    similarity: Float[Array, "batch subjects height width"],
    present: Bool[Array, "batch subjects"],
    area: Float[Array, "batch subjects"],
    rho: Float[Array, ""] | float,
) -> Match:
    """Turns similarities into M': competition between subjects, then each one's k best patches.

    1. A patch belongs to the present subject it resembles most; to each of them if several are
       exactly equal, so that the order of the subjects never matters [ours].
    2. Every subject keeps the k most similar patches among those that belong to it, over the whole
       image [known], with k from `budget` [ours]; patches of equal similarity in raster order.

    Args:
      similarity: of any source: cosine of features, or attention mass of a subject's tokens.
      present: which slots hold a subject.
      area: size of each subject in the target, in patches of this grid (its soft mask summed).
      rho: share of the subject's area to match, >= 0; may be traced.

    Returns:
      The match. No gradient flows through it.
    """
    batch, subjects, height, width = similarity.shape
    score = similarity.astype(jnp.float32).reshape(batch, subjects, height * width)
    score = jnp.where(present[..., None], score, -jnp.inf)
    own = present[..., None] & (score == jnp.max(score, axis=1, keepdims=True))

    order = jnp.argsort(jnp.where(own, -score, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)  # the inverse permutation: each patch's place
    k = budget(area, present, rho, height * width)
    kept = own & (rank < k[..., None])

    kept = kept.reshape(similarity.shape)
    return Match(
        subjects=kept.astype(jnp.float32),
        union=jnp.any(kept, axis=1).astype(jnp.float32),
        budget=jnp.sum(k, axis=1).astype(jnp.float32),
    )


def correspondence(
    reference_features: Float[Array, "batch subjects patches features"],
    reference_masks: Float[Array, "batch subjects patches"],
    target_features: Float[Array, "batch height width features"],
    present: Bool[Array, "batch subjects"],
    area: Float[Array, "batch subjects"],
    rho: Float[Array, ""] | float,
) -> Match:
    """SPAF from features: `match(cosine_similarity(prototypes(...)), ...)`.

    Reference and target features must come from the same layer (and, for a denoiser, the same
    timestep). Where prototypes are cached, call the three functions one by one.
    """
    present = present & jnp.any(reference_masks > 0, axis=-1)
    prototype = prototypes(reference_features, reference_masks, present)
    return match(cosine_similarity(prototype, target_features), present, area, rho)


def to_grid(matched: Match, grid: tuple[int, int]) -> Match:
    """The same match on another grid (h, w), usually the latents'; the budget scales with it."""
    rows, columns = matched.union.shape[-2:]
    return Match(
        subjects=nearest_on_grid(matched.subjects, grid),
        union=nearest_on_grid(matched.union, grid),
        budget=matched.budget * (grid[0] * grid[1] / (rows * columns)),
    )


def unmatched(
    prior: Float[Array, "batch height width"], matched: Float[Array, "batch height width"]
) -> Float[Array, "batch height width"]:
    """`M_s = M_prior and not M'` [known]: the subjects' part that no reference explains yet.

    Args:
      prior: M_prior as the share of each location covered, in [0, 1].
      matched: M', 0 or 1, on the same grid.
    """
    return prior * (1 - matched)


def alignment(
    matched: Match, prior: Float[Array, "batch height width"]
) -> Float[Array, "batch"]:
    """How much of the match lies where it should: `|M' and M_prior| / min(k, |M_prior|)` [ours].

    Args:
      matched: on the grid of `prior` (see `to_grid`); k is its budget.
      prior: M_prior in [0, 1].

    Returns:
      A score in [0, 1]: 1 if every match lies on a subject (or covers all of them), 0 if none
      does, and 0 where there is nothing to match.
    """
    hits = jnp.sum(matched.union * prior, axis=(1, 2))
    possible = jnp.minimum(matched.budget, jnp.sum(prior, axis=(1, 2)))
    # Soft borders and uneven grids may leave the ratio a hair above one.
    return jnp.minimum(hits / jnp.where(possible > 0, possible, 1), 1)
