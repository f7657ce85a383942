"""DPCE, the Detail-Preserving Complexity Estimator: where does an image hold fine detail?

    pixel values -> Gaussian window -> local entropy = M_d

M_d is an information-density map: the entropy of the grey levels seen through a Gaussian window
around each pixel. That chain is [known] (FocusDPO, arXiv 2509.01181, pipeline figure, panel b);
bins, window and normalisation are [ours]. The map depends on the image alone, not on the
timestep, so it is computed once, with the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from focusdpo_jax.array_types import AnyArray
from focusdpo_jax.focus.grids import average_to_grid

# Share of a bin's width over which membership passes to the neighbouring bin.
_RAMP = 0.5
# A region whose most complex patch stays below this is flat: stretching it would amplify noise.
_FLAT = 0.02


def luminance(
    image: Float[AnyArray, "batch rows columns 3"],
) -> Float[Array, "batch rows columns"]:
    """Luma of an RGB image by ITU-R Rec. 601 (as in JPEG): 0.299 R + 0.587 G + 0.114 B, in [0, 1].

    Taken on the gamma-coded values, whose steps are about equally visible. Detail between colours
    of one luminance is not seen.
    """
    return jnp.sum(image.astype(jnp.float32) * jnp.array([0.299, 0.587, 0.114]), axis=-1)


def bin_membership(values: Float[AnyArray, "*shape"], bins: int) -> Float[Array, "*shape bins"]:
    """Spreads values in [0, 1] over `bins` equal bins with short ramps in place of hard edges.

    Memberships are >= 0 and sum to 1. A value further than a quarter of a bin from every edge
    belongs wholly to one bin; on an edge it belongs to both neighbours by half.
    """
    edges = jnp.arange(1, bins)
    above = jnp.clip((values[..., None] * bins - edges) / _RAMP + 0.5, 0, 1)
    one, zero = jnp.ones_like(values)[..., None], jnp.zeros_like(values)[..., None]
    # `above[i]` is the share of the value beyond edge i: memberships are its steps.
    return jnp.concatenate([one, above], -1) - jnp.concatenate([above, zero], -1)


def gaussian_window(size: int, sigma: float) -> Float[np.ndarray, "size size"]:
    """The matrix that blurs a line of `size` pixels by a Gaussian of `sigma` pixels.

    Every row sums to one: near a border the window is cut off and renormalised, so that nothing
    beyond the image is invented.
    """
    position = np.arange(size)
    window = np.exp(-0.5 * ((position[:, None] - position[None, :]) / sigma) ** 2)
    return (window / window.sum(axis=1, keepdims=True)).astype(np.float32)


def local_entropy(
    image: Float[AnyArray, "batch rows columns 3"], bins: int = 16, sigma: float = 4.0
) -> Float[Array, "batch rows columns"]:
    """Information density of the grey levels around every pixel, in [0, 1].

        p_x  = G_sigma * membership             the window's distribution over bins
        M(x) = (H[p_x] - (G_sigma * H[membership])(x)) / log(bins)

    With hard bins the second term vanishes and this is the local entropy itself. But then a flat
    area whose grey level is on a bin's edge turns the faintest noise into entropy log 2, and a smooth
    gradient into contour lines. Soft edges mend that, and subtracting the pixels' own ambiguity
    (which leaves a Jensen-Shannon divergence) keeps a flat area at 0 for every grey level. The
    price: uniform noise tops out near 0.9.

    Args:
      image: RGB in [0, 1].
      bins: number of grey levels Q, >= 2.
      sigma: standard deviation of the window in pixels, > 0; one latent cell is a good size.
    """
    rows, columns = image.shape[1:3]
    membership = bin_membership(luminance(image), bins)
    own_entropy = jnp.sum(jax.scipy.special.entr(membership), axis=-1, keepdims=True)

    def blur(maps):
        # As matrix products: the border is exact, and it runs once an image, with the data.
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

    The maximum, not the mean: with the mean one small detail on a plain subject would get a weight
    without bound. A patch counts by its share of the prior, since what a border patch sees is
    partly background. A prior that holds next to no detail, or is empty, gives 0 everywhere.
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
    """M_d on the latent grid: `local_entropy`, averaged to the cells of `prior`, then scaled.

    Args:
      image: RGB in [0, 1], each side a multiple of the prior's.
      prior: M_prior on the latent grid, share covered, in [0, 1].
      bins, sigma: see `local_entropy`.

    Returns:
      M_d in [0, 1], whose largest value inside the prior is 1.

    Raises:
      UserError: the latent grid does not divide the image.
    """
    _, height, width = prior.shape
    detail = average_to_grid(local_entropy(image, bins, sigma), (height, width))
    return normalise_inside(detail, prior)
