"""The numbers that a step measures: one array on the device, whatever their names.

On a CPU, adding 28 scalars to 28 others takes 75 microseconds, adding one array to another 8; fetching
takes 10 an array.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Measured:
    """Named numbers.

    Attributes:
      values: float32 [n].
      names: n names.
    """

    values: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False)


def measured(values: Mapping[str, jax.Array]) -> Measured:
    """A program's numbers, {name: scalar}, as it returns them; there may be none."""
    numbers = [jnp.asarray(value, jnp.float32) for value in values.values()]
    return Measured(jnp.stack(numbers) if numbers else jnp.zeros(0), tuple(values))


@jax.jit
def added(total: tuple[Measured, ...], more: tuple[Measured, ...]) -> tuple[Measured, ...]:
    """The sums of equal numbers of two steps, on the device."""
    return jax.tree.map(jnp.add, total, more)


def as_floats(parts: Iterable[Measured]) -> dict[str, float]:
    """All numbers on the host, by name; waits for them."""
    parts = jax.device_get(tuple(parts))
    return {
        name: value
        for part in parts
        for name, value in zip(part.names, np.asarray(part.values).tolist(), strict=True)
    }
