"""Tracing of models for the devices of a mesh; the models themselves contain no sharding code."""

import contextlib
import functools
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from focusdpo_jax.models import platforms
from focusdpo_jax.sharding import activations, attention

# Part of jax's tracing cache key, so that a jitted function's trace for one mesh is not reused for
# another.
_MESH = jax.make_user_context()


@contextlib.contextmanager
def trace_context(mesh: Mesh) -> Iterator[None]:
    """Traces models inside the context for the devices of a mesh.

    It sets the target platform, partitions opaque attention kernels and constrains activations.

    Args:
      mesh: its devices may be compile-only, and of another kind than this machine's.
    """
    target = platforms.target_of(mesh.devices.flat[0])
    partition = functools.partial(attention.by_example_and_head, mesh)
    with (
        _MESH(mesh),
        activations.constrain_activations(mesh),
        platforms.target_platform(target, partition),
    ):
        yield
