"""Keeps activations divided by example, whatever the parameters are divided by.

Left to itself, XLA's partitioner may as well multiply by the part of a kernel that a device has and
add up activations. Where every layer's output is said to be divided by example, it gathers the
kernel instead, layer by layer, where it is used, and again in the backward pass of what is
recomputed. Models know nothing of it: Flax lets a caller look at what its modules return.
"""

import contextlib
import math

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from focusdpo_jax.sharding.mesh import BATCH_AXES


@contextlib.contextmanager
def constrain_activations(mesh):
    """While a function is traced inside, its modules' outputs [N, ...] are divided over `mesh`.

    N is a batch or a multiple of it; what cannot be divided, such as one empty prompt, is let be.
    The other axes are the partitioner's to choose.
    """
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if mesh.size == 1:
        yield
        return

    def constrain(x):
        if not isinstance(x, jax.Array) or x.ndim < 2 or len(x) % shares:
            return x
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *free))
        )

    def intercept(call, arguments, keywords, context):
        outputs = call(*arguments, **keywords)
        return jax.tree.map(constrain, outputs) if context.method_name == "__call__" else outputs

    with nn.intercept_methods(intercept):
        yield
