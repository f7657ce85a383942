"""Moving maps between grids."""

import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.focus import grids


def test_average_is_the_share_of_each_cell():
    mask = jnp.array([[1, 1, 0, 0], [1, 0, 0, 1]], jnp.float32)
    np.testing.assert_array_equal(grids.average_to_grid(mask[None], (1, 2)), [[[0.75, 0.25]]])


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="5 x 4 does not divide a map of 8 x 8"):
        grids.average_to_grid(jnp.zeros((1, 8, 8)), (5, 4))


@pytest.mark.parametrize(
    "columns, expected",
    [
        (6, [0, 0, 1, 1, 2, 2]),
        (2, [0, 2]),
        (4, [0, 1, 1, 2]),
        (3, [0, 1, 2]),
    ],
)
def test_nearest_reads_the_cell_under_each_centre(columns, expected):
    line = jnp.arange(3.0)[None, None]
    np.testing.assert_array_equal(grids.nearest_on_grid(line, (1, columns)), [[expected]])
