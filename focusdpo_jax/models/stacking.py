"""Equal blocks in a row: one parameter with an axis over the blocks here, one each in every file.

With `UNetConfig.scan_layers` transformer blocks run in a loop (`nn.scan`), and ten of them are compiled
once. Their parameters are stacked, [blocks, ...] under `transformer_blocks`. Without it, and in every
file, they are `transformer_blocks_0`, `transformer_blocks_1`, ... `split` and `join` convert between the
two; a tree without stacked parameters passes through both unchanged.
"""

import jax
import numpy as np
from flax import traverse_util

STACKED = "transformer_blocks"


def is_vector(path, shape):
    """Whether a parameter is a bias or a norm's: in each block of one axis, or of none."""
    return len(shape) - (STACKED in path) < 2


def split(tree):
    """A tree with a parameter for each block, under the names of files.

    Args:
      tree: nested dict of arrays, of which those of blocks become views, or of
        `jax.ShapeDtypeStruct`s.
    """
    flat = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        if STACKED not in path:
            flat[path] = leaf
            continue
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        leaf = leaf if abstract else np.asarray(leaf)
        for number in range(leaf.shape[0]):
            flat[block_path(path, number)] = (
                jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if abstract else leaf[number]
            )
    return traverse_util.unflatten_dict(flat)


def as_it_is(path, array):
    """Leaves an array where and what it is."""
    del path
    return array


def join(flat, template, read=np.asarray, place=as_it_is):
    """The tree that `split` took apart; blocks are stacked one parameter after the other.

    Args:
      flat: {path in `split(template)`: what `read` makes a numpy array of}.
      template: nested dict of arrays or shapes, whose structure the result has; what `flat` has no
        block of may be missing.
      place: function of a path of the result and its array; the leaf is what it returns.
    """
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(template).items():
        if STACKED not in path:
            if path in flat:
                leaves[path] = place(path, read(flat[path]))
            continue
        blocks = [block_path(path, number) for number in range(leaf.shape[0])]
        if blocks[0] in flat:
            leaves[path] = place(path, _stacked([flat[block] for block in blocks], read))
    return traverse_util.unflatten_dict(leaves)


def block_path(path, number):
    """The path that a parameter of stacked blocks has in each file, for the block of a number."""
    where = path.index(STACKED)
    return (*path[:where], f"{STACKED}_{number}", *path[where + 1 :])


def _stacked(blocks, read):
    """The parameters of all blocks in one array; no more than one is held besides it."""
    for number, block in enumerate(blocks):
        block = read(block)
        if not number:
            whole = np.empty((len(blocks), *block.shape), block.dtype)
        whole[number] = block
    return whole
