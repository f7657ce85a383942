"""Sharding constraints that keep activations sharded by example.

Without constraints XLA's partitioner may multiply by the shard of a kernel that a device holds, and
sum activations over devices. If the output of every layer is constrained to be sharded by example,
it gathers the kernel instead, layer by layer, where it is used, and again where the backward pass
recomputes. The models contain no sharding code: the constraints are added by intercepting the
methods of Flax modules.
"""

import contextlib
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from focusdpo_jax.sharding.mesh import BATCH_AXES


@contextlib.contextmanager
def constrain_activations(mesh: Mesh) -> Iterator[None]:
    """Constrains the outputs [N, ...] of modules traced inside the context to be sharded over N.

    N is a multiple of the batch size. Outputs that do not divide, such as those of a single empty
    prompt, are not constrained. The partitioner chooses the sharding of the other axes.

    Args:
      mesh: N is sharded over its axes `BATCH_AXES`.
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
