"""Random parameters, generated on the device in seconds, without a copy on the host."""

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


def random_parameters(shapes):
    """Random parameters without zeros, scaled to preserve the variance of activations.

    Values depend on path, shape and dtype only, and are equal in every process.

    Args:
      shapes: nested dict of `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      Nested dict of arrays.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(shapes)
    kinds = {(leaf.shape, leaf.dtype, leaf.sharding) for leaf in flat.values()}
    # One program per shape, since a single one for all leaves takes minutes to compile.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(kinds, pool.map(_program, kinds), strict=True))
    tree = {}
    for path, leaf in flat.items():
        vector = stacking.is_vector(path, leaf.shape)
        fan_in = math.prod(leaf.shape[stacking.STACKED in path : -1])
        tree[path] = programs[leaf.shape, leaf.dtype, leaf.sharding](
            np.uint32(zlib.crc32("/".join(path).encode())),
            np.float32(vector and path[-1] == "scale"),
            np.float32(0.02 if vector else fan_in**-0.5),
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
