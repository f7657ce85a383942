"""DPCE, the Detail-Preserving Complexity Estimator: locates fine detail in an image.

    pixel values -> Gaussian window -> local entropy = M_d

M_d is an information-density map: the entropy of the grey levels in a Gaussian window around each
pixel. This chain is [known] (FocusDPO, arXiv 2509.01181, pipeline figure, panel b). Bins, window
and normalisation are [ours]. The map depends only on the image, not on the timestep, so it is
computed once, with the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    image: Float[AnyArray, "batch rows columns 3"], bins: int = 16, sigma: float = 4.0
) -> Float[Array, "batch rows columns"]:
    """Computes the information density of the grey levels around every pixel, in [0, 1].

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
      bins: number of grey levels Q, >= 2.
      sigma: standard deviation of the window in pixels, > 0; one latent cell is a good size.
    """
    rows, columns = image.shape[1:3]
    membership = bin_membership(luminance(image), bins)
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
) -> Float[Array, "batch height width"]:
    """Computes M_d on the latent grid: `local_entropy`, averaged to the grid of `prior` and scaled.

    Args:
      image: RGB in [0, 1], each side a multiple of the prior's.
      prior: M_prior on the latent grid, the covered share of each location, in [0, 1].
      bins, sigma: see `local_entropy`.

    Returns:
      M_d in [0, 1], whose largest value inside the prior is 1.

    Raises:
      UserError: the latent grid does not divide the image.
    """
    _, height, width = prior.shape
    detail = average_to_grid(local_entropy(image, bins, sigma), (height, width))
    return normalise_inside(detail, prior)
