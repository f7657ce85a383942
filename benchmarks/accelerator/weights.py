"""Random parameters, made on the device: SDXL's in seconds, and never a copy on the host."""

import concurrent.futures
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from focusdpo_jax.models import stacking


def draw(shapes):
    """Parameters at the scale that keeps activations as they are; none is zero.

    The same path, shape and type have the same values in every process.

    Args:
      shapes: nested dict of `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      The tree of arrays.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(shapes)
    kinds = {(leaf.shape, leaf.dtype, leaf.sharding) for leaf in flat.values()}
    # One program for each shape: one for all of them would compile for minutes.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(kinds, pool.map(_program, kinds), strict=True))
    tree = {}
    for path, leaf in flat.items():
        vector = stacking.is_vector(path, leaf.shape)
        summed = math.prod(leaf.shape[stacking.STACKED in path : -1])
        tree[path] = programs[leaf.shape, leaf.dtype, leaf.sharding](
            np.uint32(zlib.crc32("/".join(path).encode())),
            np.float32(vector and path[-1] == "scale"),
            np.float32(0.02 if vector else summed**-0.5),
        )
    return traverse_util.unflatten_dict(tree)


def _program(kind):
    shape, dtype, sharding = kind

    @functools.partial(jax.jit, out_shardings=sharding)
    def normal(seed, mean, deviation):
        values = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        return (mean + deviation * values).astype(dtype)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return normal.lower(jax.ShapeDtypeStruct((), jnp.uint32), scalar, scalar).compile()
