"""Conversion between stacked parameters of equal transformer blocks and one tree per block.

With `UNetConfig.scan_layers` transformer blocks run as a loop (`nn.scan`), so that ten of them are
compiled once. Their parameters are stacked, [blocks, ...] under `transformer_blocks`. Without it,
and in every file, they are `transformer_blocks_0`, `transformer_blocks_1`, and so on. `split` and
`join` convert between the two; both return a tree without stacked parameters unchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from focusdpo_jax.models.parameters import Params, Path, flatten, unflatten

STACKED = "transformer_blocks"


def is_vector(path: Path, shape: Sequence[int]) -> bool:
    """Returns whether a parameter has fewer than two axes in each block: biases, norms, scalars."""
    return len(shape) - (STACKED in path) < 2


def split(tree: Params) -> dict[str, Any]:
    """Splits stacked parameters into one tree per block, with the names used in files.

    Args:
      tree: nested dict of arrays, whose blocks become numpy views, or of `jax.ShapeDtypeStruct`s.
    """
    flat = {}
    for path, leaf in flatten(tree).items():
        if STACKED not in path:
            flat[path] = leaf
            continue
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        leaf = leaf if abstract else np.asarray(leaf)
        for number in range(leaf.shape[0]):
            flat[block_path(path, number)] = (
                jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if abstract else leaf[number]
            )
    return unflatten(flat)


def keep_array(path: Path, array: np.ndarray) -> np.ndarray:
    """Returns `array`: the default `place` of `join`."""
    del path
    return array


def join(
    flat: Mapping[Path, Any],
    template: Params,
    read: Callable[[Any], np.ndarray] = np.asarray,
    place: Callable[[Path, np.ndarray], Any] = keep_array,
) -> dict[str, Any]:
    """Stacks the blocks of a split tree, one parameter after the other; the inverse of `split`.

    Args:
      flat: {path in `split(template)`: leaf}; leaves that are missing are missing in the result.
      template: nested dict of arrays or shapes with the structure of the result.
      read: converts a leaf of `flat` to a numpy array.
      place: function of a path in the result and its numpy array that returns the leaf, for
        example on devices.
    """
    leaves = {}
    for path, leaf in flatten(template).items():
        if STACKED not in path:
            if path in flat:
                leaves[path] = place(path, read(flat[path]))
            continue
        blocks = [block_path(path, number) for number in range(leaf.shape[0])]
        if blocks[0] in flat:
            leaves[path] = place(path, _stack([flat[block] for block in blocks], read))
    return unflatten(leaves)


def block_path(path: Path, number: int) -> Path:
    """Returns the path in files of a stacked parameter, for one block.

    Args:
      path: path of the stacked parameter.
      number: index of the block.
    """
    index = path.index(STACKED)
    return (*path[:index], f"{STACKED}_{number}", *path[index + 1 :])


def _stack(blocks: Sequence[Any], read: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Stacks a parameter of all blocks; at most one block is held besides the result."""
    first = read(blocks[0])
    stacked = np.empty((len(blocks), *first.shape), first.dtype)
    stacked[0] = first
    del first
    for number, block in enumerate(blocks[1:], 1):
        stacked[number] = read(block)
    return stacked
