"""Programs of models for the devices of a mesh, which models know nothing of."""

import contextlib
import functools

from focusdpo_jax.models import platforms
from focusdpo_jax.sharding import activations, attention


@contextlib.contextmanager
def traced_for(mesh):
    """While a function is traced inside, its models' layers are made for the devices of `mesh`.

    They need not be there, nor be of this machine's kind.
    """
    platform = mesh.devices.flat[0].platform
    divide = functools.partial(attention.by_example_and_head, mesh)
    with activations.divided(mesh), platforms.compiled_for(platform, divide):
        yield
