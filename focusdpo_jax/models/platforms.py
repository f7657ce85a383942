"""The device that a program is compiled for: what is fast on one is slow, or missing, on another.

Layers read `current()` while they are traced. Whoever compiles for other devices than those of this
machine sets it with `target_platform`.
"""

import contextlib
import contextvars
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      compute_capability: of an NVIDIA GPU, such as 9.0; None for anything else.
    """

    platform: str
    compute_capability: float | None = None


_TARGET = contextvars.ContextVar("target", default=None)
_DIVIDE = contextvars.ContextVar("divide", default=None)


def target_of(device):
    """The `Target` of a `jax.Device`, which may be one to compile for only."""
    try:
        return Target(device.platform, float(device.compute_capability))
    except (AttributeError, ValueError):  # No GPU, or AMD's, whose architectures have names.
        return Target(device.platform)


@contextlib.contextmanager
def target_platform(target, divide=None):
    """While a function is traced inside, layers take the paths for `target`.

    Without it they take those for this machine's devices, which need not be where a program will run.

    Args:
      target: a `Target`.
      divide: from a function of query, key and value, [B, N, H, d] each, to one that runs it on the
        devices of the program, each with its share. Kernels that the partitioner cannot look into
        are taken only where it is given.
    """
    tokens = _TARGET.set(target), _DIVIDE.set(divide)
    try:
        yield
    finally:
        _TARGET.reset(tokens[0])
        _DIVIDE.reset(tokens[1])


def current():
    """The `Target` that is traced for."""
    return _TARGET.get() or target_of(jax.devices()[0])


def divide():
    """The function `divide` of `target_platform`, or None."""
    return _DIVIDE.get()
