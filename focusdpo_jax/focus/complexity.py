"""DPCE, the Detail-Preserving Complexity Estimator: locates fine detail in an image.

    pixel values -> Gaussian window -> local entropy = M_d

M_d is an information-density map: the entropy of the values in a Gaussian window around each pixel. This chain is [known] (FocusDPO, arXiv 2509.01181, pipeline figure, panel b). Bins, window
and normalisation are [ours]. The map depends only on the image, not on the timestep, so it is
computed once, with the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from focusdpo_jax.array_types import AnyArray
from focusdpo_jax.focus.grids import average_to_grid

# Width of the ramp between two bins, as a share of a bin's width.
_RAMP = 0.5
# A region whose largest value is below this is flat; scaling it to 1 would amplify noise.
_FLAT = 0.02


def luminance(
    image: Float[AnyArray, "batch rows columns 3"],
) -> Float[Array, "batch rows columns"]:
    """Computes the luma of an RGB image in [0, 1]: 0.299 R + 0.587 G + 0.114 B.

    The weights are those of ITU-R Rec. 601 (as in JPEG). They are applied to the gamma-coded
    values, whose differences are about equally visible. Contrast between colours of equal luma is
    ignored.
    """
    return jnp.sum(image.astype(jnp.float32) * jnp.array([0.299, 0.587, 0.114]), axis=-1)


def bin_membership(values: Float[AnyArray, "*shape"], bins: int) -> Float[Array, "*shape bins"]:
    """Assigns values in [0, 1] to `bins` equal bins, with short ramps instead of hard edges.

    Memberships are >= 0 and sum to 1. A value further than a quarter of a bin from every edge
    belongs to one bin only. A value on an edge belongs to both bins by half.
    """
    edges = jnp.arange(1, bins)
    above = jnp.clip((values[..., None] * bins - edges) / _RAMP + 0.5, 0, 1)
    one, zero = jnp.ones_like(values)[..., None], jnp.zeros_like(values)[..., None]
    # `above[i]` is the share of the value above edge i; memberships are the differences.
    return jnp.concatenate([one, above], -1) - jnp.concatenate([above, zero], -1)


def gaussian_window(size: int, sigma: float) -> Float[np.ndarray, "size size"]:
    """Returns the matrix that blurs a line of `size` pixels by a Gaussian of `sigma` pixels.

    Every row sums to one: near a border the window is truncated and renormalised, so that it needs
    no values outside the image.
    """
    position = np.arange(size)
    window = np.exp(-0.5 * ((position[:, None] - position[None, :]) / sigma) ** 2)
    return (window / window.sum(axis=1, keepdims=True)).astype(np.float32)


def local_entropy(
    image: Float[AnyArray, "batch rows columns 3"],
    bins: int = 16,
    sigma: float = 4.0,
    colour: bool = False,
) -> Float[Array, "batch rows columns"]:
    """Computes the information density of the values around every pixel, in [0, 1].

        p_x  = G_sigma * membership             the window's distribution over bins
        M(x) = (H[p_x] - (G_sigma * H[membership])(x)) / log(bins)

    With hard bins the second term is 0 and M is the normalised local entropy. Hard bins have two
    problems: in a flat area whose grey level is at the edge of a bin, weak noise has an entropy of
    log 2, and a smooth gradient gives contour lines. Soft edges remove both. The second term
    subtracts the entropy of the pixels' own memberships, so that M is a Jensen-Shannon divergence,
    which is 0 for a flat area of any grey level. As a consequence the maximum, for uniform noise,
    is about 0.9.

    Args:
      image: RGB in [0, 1].
      bins: number of levels Q, >= 2.
      sigma: standard deviation of the window in pixels, > 0; one latent cell is a good size.
      colour: False for grey levels; True for the mean of M over the red, green and blue values,
        which does not ignore edges between colours of equal luma [ours].
    """
    if colour:
        channels = jnp.moveaxis(image, -1, 0)
        return jnp.mean(jax.vmap(lambda x: _information(x, bins, sigma))(channels), axis=0)
    return _information(luminance(image), bins, sigma)


def _information(values, bins, sigma):
    """Computes M of `local_entropy` for values [B, H, W] in [0, 1]."""
    rows, columns = values.shape[1:]
    membership = bin_membership(values.astype(jnp.float32), bins)
    own_entropy = jnp.sum(jax.scipy.special.entr(membership), axis=-1, keepdims=True)

    def blur(maps):
        # Matrix products treat the border exactly. Speed is not critical: this runs once per image.
        maps = jnp.einsum("yY,bYxq->byxq", gaussian_window(rows, sigma), maps, precision="highest")
        return jnp.einsum(
            "xX,byXq->byxq", gaussian_window(columns, sigma), maps, precision="highest"
        )

    entropy = jnp.sum(jax.scipy.special.entr(blur(membership)), axis=-1)
    information = entropy - blur(own_entropy)[..., 0]
    return jnp.clip(information / np.log(bins), 0, 1)


def normalise_inside(
    detail: Float[AnyArray, "batch height width"], prior: Float[AnyArray, "batch height width"]
) -> Float[Array, "batch height width"]:
    """Scales a map so that its largest value inside the prior is 1 [ours]; result in [0, 1].

    The maximum is used because with the mean a small detail on a plain subject would get an
    unbounded weight. Each patch is multiplied by its share of the prior, since border patches are
    partly background. The result is 0 everywhere if the prior is empty or has almost no detail.
    """
    largest = jnp.max(detail * prior, axis=(1, 2), keepdims=True)
    scaled = detail / jnp.where(largest > _FLAT, largest, 1)
    return jnp.where(largest > _FLAT, jnp.minimum(scaled, 1), 0)


def complexity(
    image: Float[AnyArray, "batch rows columns 3"],
    prior: Float[AnyArray, "batch height width"],
    bins: int = 16,
    sigma: float = 4.0,
    colour: bool = False,
) -> Float[Array, "batch height width"]:
    """Computes M_d on the latent grid: `local_entropy`, averaged to the grid of `prior` and scaled.

    Args:
      image: RGB in [0, 1], each side a multiple of the prior's.
      prior: M_prior on the latent grid, the covered share of each location, in [0, 1].
      bins, sigma, colour: see `local_entropy`.

    Returns:
      M_d in [0, 1], whose largest value inside the prior is 1.

    Raises:
      UserError: the latent grid does not divide the image.
    """
    _, height, width = prior.shape
    detail = average_to_grid(local_entropy(image, bins, sigma, colour), (height, width))
    return normalise_inside(detail, prior)


def reference_complexity(
    references: Float[AnyArray, "batch subjects rows columns 3"],
    reference_masks: Float[AnyArray, "batch subjects rows columns"]
    | Bool[AnyArray, "batch subjects rows columns"],
    bins: int = 16,
    sigma: float = 4.0,
    colour: bool = False,
) -> Float[Array, "batch subjects"]:
    """Computes the complexity of each reference: the mean of `local_entropy` inside its mask.

    That the complexity of the references matters is [known] (the abstract of FocusDPO, arXiv
    2509.01181). The measure is [ours].

    Args:
      references: RGB in [0, 1].
      reference_masks: the subject's pixels in its reference.
      bins, sigma, colour: see `local_entropy`.

    Returns:
      A value in [0, 1] for each subject; 0 for an empty mask.
    """
    flat = references.reshape(-1, *references.shape[2:])
    masks = reference_masks.astype(jnp.float32)
    entropy = local_entropy(flat, bins, sigma, colour).reshape(masks.shape)
    area = jnp.sum(masks, axis=(2, 3))
    return jnp.sum(masks * entropy, axis=(2, 3)) / jnp.where(area > 0, area, 1)


def scale_by_reference(
    detail: Float[AnyArray, "batch height width"],
    subject_masks: Float[AnyArray, "batch subjects height width"],
    complexities: Float[AnyArray, "batch subjects"],
    present: Bool[AnyArray, "batch subjects"] | None = None,
) -> Float[Array, "batch height width"]:
    """Multiplies M_d inside each subject by the relative complexity of its reference [ours].

        M_d(x) sum_s m_s(x) c_s / (sum_s m_s(x) max_s c_s)

    The detail of the subject with the most complex reference keeps its weight. Locations that no
    subject covers keep theirs, too.

    Args:
      detail: M_d of one image of each pair, from `complexity`.
      subject_masks: m, share of each location that each subject covers, in [0, 1].
      complexities: c, from `reference_complexity`.
      present: which slots have a subject; None for all. Other slots have no effect.
    """
    if present is not None:
        complexities = jnp.where(present, complexities, 0)
        subject_masks = jnp.where(jnp.asarray(present)[:, :, None, None], subject_masks, 0)
    largest = jnp.max(complexities, axis=1, keepdims=True)
    relative = jnp.where(largest > 0, complexities / jnp.where(largest > 0, largest, 1), 1)
    covered = jnp.sum(subject_masks, axis=1)
    mean = jnp.sum(subject_masks * relative[:, :, None, None], axis=1)
    return jnp.asarray(detail) * jnp.where(
        covered > 0, mean / jnp.where(covered > 0, covered, 1), 1
    )
