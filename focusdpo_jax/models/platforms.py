"""Which platform a program is made for: what is fast on one is slow, or not there, on another.

Layers ask while they are traced. Whoever compiles for other devices than those of this machine says so.
"""

import contextlib
import contextvars

import jax

_PLATFORM = contextvars.ContextVar("platform", default=None)
_DIVIDE = contextvars.ContextVar("divide", default=None)


@contextlib.contextmanager
def compiled_for(platform, divide=None):
    """While a function is traced inside, it takes the paths for "cpu", "gpu" or "tpu".

    Without it they are those of this machine, which need not be where a program will run.

    Args:
      divide: from a function of query, key and value, [B, N, H, d] each, to one that runs it on the
        devices of the program, each with its share. Kernels that the partitioner cannot look into
        are taken only where it is given.
    """
    tokens = _PLATFORM.set(platform), _DIVIDE.set(divide)
    try:
        yield
    finally:
        _PLATFORM.reset(tokens[0])
        _DIVIDE.reset(tokens[1])


def current():
    """The platform that is traced for: "cpu", "gpu" or "tpu"."""
    return _PLATFORM.get() or jax.devices()[0].platform


def divide():
    """The function `divide` of `compiled_for`, or None."""
    return _DIVIDE.get()
