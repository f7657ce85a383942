import jax
import numpy as np
from flax import traverse_util

from focusdpo_jax.models import stacking

TREE = {
    "mid_block": {
        "transformer_blocks": {
            "norm1": {"scale": np.arange(12.0).reshape(4, 3)},
            "ff": {"net_2": {"kernel": np.arange(24.0).reshape(4, 2, 3)}},
        }
    },
    "conv_in": {"kernel": np.ones((3, 3, 4, 8))},
}


def test_blocks_are_stacked_here_and_separate_in_files():
    apart = stacking.split(TREE)
    assert set(apart["mid_block"]) == {f"transformer_blocks_{i}" for i in range(4)}
    third = apart["mid_block"]["transformer_blocks_2"]
    np.testing.assert_array_equal(third["norm1"]["scale"], [6.0, 7.0, 8.0])
    np.testing.assert_array_equal(third["ff"]["net_2"]["kernel"], [[12, 13, 14], [15, 16, 17]])
    # Not in the order of their names, in which 10 comes before 2.
    flat = dict(reversed(traverse_util.flatten_dict(apart).items()))
    jax.tree.map(np.testing.assert_array_equal, stacking.join(flat, TREE), TREE)
    seen = []
    stacking.join(flat, TREE, place=lambda path, array: seen.append((path, array.shape)))
    assert dict(seen) == {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(TREE).items()
    }
    # A model whose layers are not scanned has its parameters as files have them.
    jax.tree.map(np.testing.assert_array_equal, stacking.join(flat, apart), apart)


def test_shapes_are_split_alike():
    shapes = stacking.split(jax.eval_shape(lambda: TREE))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, stacking.split(TREE)
    )


def test_a_norm_of_many_blocks_is_still_a_vector():
    assert stacking.is_vector(("mid_block", "transformer_blocks", "norm1", "scale"), (4, 3))
    assert not stacking.is_vector(("mid_block", "transformer_blocks", "to_q", "kernel"), (4, 3, 3))
    assert not stacking.is_vector(("conv_in", "kernel"), (3, 3, 4, 8))
    assert stacking.is_vector(("conv_in", "bias"), (8,))
