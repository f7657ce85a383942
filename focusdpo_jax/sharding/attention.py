"""How a kernel of attention that XLA's partitioner cannot look into lies on the mesh."""

import math

import jax
from jax.sharding import PartitionSpec

from focusdpo_jax.sharding.mesh import BATCH_AXES


def by_example_and_head(mesh, attend):
    """`attend` on every device for its examples and heads.

    Args:
      attend: function of query, key and value, each [B, N, H, d], to [B, Q, H, d].

    Returns:
      The same function of whole arrays. What does not divide, an odd batch or ten heads among four
      devices, is done on all of them.
    """
    if mesh.size == 1:
        return attend

    def divided(query, key, value):
        batch, _, heads, _ = query.shape
        examples = None if batch % math.prod(mesh.shape[a] for a in BATCH_AXES) else BATCH_AXES
        spec = PartitionSpec(examples, None, None if heads % mesh.shape["tensor"] else "tensor")
        # The kernel is opaque to the check of what varies over which axis, too.
        return jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
            query, key, value
        )

    return divided
