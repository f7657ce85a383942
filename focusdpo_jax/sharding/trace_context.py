"""Programs of models for the devices of a mesh, which models know nothing of."""

import contextlib
import functools

import jax

from focusdpo_jax.models import platforms
from focusdpo_jax.sharding import activations, attention

# jax knows of it, and takes no jitted function's trace for one mesh in a program for another.
_MESH = jax.make_user_context()


@contextlib.contextmanager
def trace_context(mesh):
    """While a function is traced inside, its models' layers are made for the devices of `mesh`.

    They need not be there, nor be of this machine's kind.
    """
    target = platforms.target_of(mesh.devices.flat[0])
    divide = functools.partial(attention.by_example_and_head, mesh)
    with (
        _MESH(mesh),
        activations.constrain_activations(mesh),
        platforms.target_platform(target, divide),
    ):
        yield
