import jax
import numpy as np
from jax.sharding import Mesh

from focusdpo_jax.sharding.trace_context import trace_context


def test_a_trace_for_one_mesh_is_not_reused_for_another():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    one, other = (
        Mesh(devices, names) for names in (("data", "fsdp", "tensor"), ("tensor", "data", "fsdp"))
    )
    traces = []

    @jax.jit
    def function(x):
        traces.append(x)
        return x

    for mesh, count in (one, 1), (other, 2), (one, 2):
        with trace_context(mesh):
            function(1.0)
        assert len(traces) == count
