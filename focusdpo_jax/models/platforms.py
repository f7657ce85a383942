"""The device kind that a program is compiled for.

Layers choose between formulations with `current()` while they are traced: what is fast on one
device is slow or missing on another. Code that compiles for other devices than this machine's sets
the target with `target_platform`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import Array


class Target(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      compute_capability: compute capability of an NVIDIA GPU, such as 9.0; None for all other
        devices.
    """

    platform: str
    compute_capability: float | None = None


# A function of query, key and value, [B, N, H, d] each.
Attend = Callable[[Array, Array, Array], Array]

_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)
_PARTITION: contextvars.ContextVar[Callable[[Attend], Attend] | None] = contextvars.ContextVar(
    "partition", default=None
)


def target_of(device: Any) -> Target:
    """Returns the `Target` of a `jax.Device`, which may be a compile-only one."""
    try:
        return Target(device.platform, float(device.compute_capability))
    # Not a GPU, or one of AMD's, whose architectures are not numbers.
    except (AttributeError, ValueError):
        return Target(device.platform)


@contextlib.contextmanager
def target_platform(
    target: Target, partition: Callable[[Attend], Attend] | None = None
) -> Iterator[None]:
    """Traces layers for `target` inside the context; outside, for this machine's devices.

    Args:
      target: the kind of device that will run the program.
      partition: maps a function of query, key and value, [B, N, H, d] each, to one that runs it on
        every device of the program with that device's shard. Kernels that XLA's partitioner cannot
        partition are used only if it is given.
    """
    tokens = _TARGET.set(target), _PARTITION.set(partition)
    try:
        yield
    finally:
        _TARGET.reset(tokens[0])
        _PARTITION.reset(tokens[1])


def current() -> Target:
    """Returns the target of the innermost `target_platform`, or that of this machine's devices."""
    return _TARGET.get() or target_of(jax.devices()[0])


def partition() -> Callable[[Attend], Attend] | None:
    """Returns the argument `partition` of the innermost `target_platform`, or None."""
    return _PARTITION.get()
