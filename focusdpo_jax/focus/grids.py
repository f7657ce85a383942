"""Resamples maps between grids: pixels, latent locations, and patches of a feature extractor."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from focusdpo_jax.array_types import AnyArray
from focusdpo_jax.errors import UserError


def average_to_grid(
    maps: Float[AnyArray, "*batch rows columns"], grid: tuple[int, int]
) -> Float[Array, "*batch height width"]:
    """Averages maps over the cells of a coarser grid; a binary mask becomes the covered share.

    Args:
      maps: [..., H, W].
      grid: (h, w) with h dividing H and w dividing W.

    Raises:
      UserError: the grid does not divide the map.

    Example: a mask [B, 64, 64] of an image whose latents are 16 x 16:
      `prior = average_to_grid(mask, (16, 16))`.
    """
    rows, columns = maps.shape[-2:]
    height, width = grid
    if rows % height or columns % width:
        raise UserError(
            f"grid {height} x {width} does not divide a map of {rows} x {columns}: choose a "
            "resolution that is a multiple of the grid"
        )
    cells = maps.reshape(*maps.shape[:-2], height, rows // height, width, columns // width)
    return jnp.mean(cells, axis=(-3, -1))


def nearest_on_grid(
    maps: Float[AnyArray, "*batch rows columns"], grid: tuple[int, int]
) -> Float[Array, "*batch height width"]:
    """Samples maps at the centres of another grid's cells; the ratio of the grids is arbitrary.

    Nearest neighbours keep a binary match binary.
    """
    rows, columns = maps.shape[-2:]
    height, width = grid
    nearest_row = ((np.arange(height) + 0.5) * rows / height).astype(int)
    nearest_column = ((np.arange(width) + 0.5) * columns / width).astype(int)
    return jnp.asarray(maps)[..., nearest_row[:, None], nearest_column]


def share_on_grid(
    masks: Float[AnyArray, "*batch rows columns"] | Bool[AnyArray, "*batch rows columns"],
    grid: tuple[int, int],
) -> Float[Array, "*batch height width"]:
    """Computes the share of each cell of a grid (h, w) that masks cover; any ratio of the grids.

    Uses `average_to_grid` if the grid divides the masks, and an antialiased resize otherwise.
    """
    masks = masks.astype(jnp.float32)
    rows, columns = masks.shape[-2:]
    if rows % grid[0] or columns % grid[1]:
        return jax.image.resize(masks, (*masks.shape[:-2], *grid), "linear", antialias=True)
    return average_to_grid(masks, grid)
