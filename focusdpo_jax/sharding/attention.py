"""Partitions attention kernels that are opaque to XLA's partitioner."""

import math

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from focusdpo_jax.models.platforms import Attend
from focusdpo_jax.sharding.mesh import BATCH_AXES


def by_example_and_head(mesh: Mesh, attend: Attend) -> Attend:
    """Runs an attention kernel on every device for that device's examples and heads.

    Args:
      mesh: examples are sharded over its axes `BATCH_AXES`, heads over "tensor".
      attend: function of query, key and value, each [B, N, H, d], that returns [B, Q, H, d].

    Returns:
      The same function of global arrays. An axis that does not divide, such as an odd batch or ten
      heads over four devices, is replicated: every device computes all of it.
    """
    if mesh.size == 1:
        return attend

    def partitioned(query: Array, key: Array, value: Array) -> Array:
        batch, _, heads, _ = query.shape
        examples = None if batch % math.prod(mesh.shape[a] for a in BATCH_AXES) else BATCH_AXES
        spec = PartitionSpec(examples, None, None if heads % mesh.shape["tensor"] else "tensor")
        # The kernel is opaque to the check of varying mesh axes, too.
        return jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
            query, key, value
        )

    return partitioned
