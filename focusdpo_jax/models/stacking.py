"""Equal blocks in a row: one parameter with an axis over the blocks here, one each in every file.

The UNet's transformer blocks run in a loop (`nn.scan`), so that ten of them are compiled once. Their
parameters lie together, [blocks, ...] under `transformer_blocks`; files, people's as well as ours, know
`transformer_blocks_0`, `transformer_blocks_1`, ... `split` and `join` lead from one to the other.
"""

import re

import jax
import numpy as np
from flax import traverse_util

STACKED = "transformer_blocks"
_BLOCK = re.compile(rf"{STACKED}_(\d+)$")


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
        where = path.index(STACKED)
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        leaf = leaf if abstract else np.asarray(leaf)
        for number in range(leaf.shape[0]):
            block = (*path[:where], f"{STACKED}_{number}", *path[where + 1:])
            flat[block] = (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if abstract
                           else leaf[number])
    return traverse_util.unflatten_dict(flat)


def as_it_is(path, array):
    """Leaves an array where and what it is."""
    del path
    return array


def join(flat, read=np.asarray, place=as_it_is):
    """The tree that `split` took apart; blocks are stacked one parameter after the other.

    Args:
      flat: {path: what `read` makes a numpy array of}. Blocks are numbered from 0 without a gap.
      place: function of a path of the result and its array; the leaf is what it returns.
    """
    blocks = {}
    for path in flat:
        numbered = [(i, match) for i, part in enumerate(path) if (match := _BLOCK.match(part))]
        if not numbered:
            blocks[path] = path
            continue
        (where, match), = numbered
        whole = (*path[:where], STACKED, *path[where + 1:])
        blocks.setdefault(whole, {})[int(match[1])] = path
    leaves = {}
    for path, members in blocks.items():
        leaves[path] = place(path, _stacked(members, flat, read) if isinstance(members, dict)
                             else read(flat[members]))
    return traverse_util.unflatten_dict(leaves)


def _stacked(members, flat, read):
    """The parameters of {number: path} in one array; no more than one is held besides it."""
    for number in range(len(members)):
        block = read(flat[members[number]])
        if not number:
            whole = np.empty((len(members), *block.shape), block.dtype)
        whole[number] = block
    return whole
