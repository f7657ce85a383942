"""How XLA is asked to compile, where that differs from what it does by itself."""

import functools
import os

import jax

# For programs that run seldom: compiling them well would take longer than running them badly.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}

# On a CPU XLA has YNNPACK do reductions, matrix products and convolutions. Left with reductions alone,
# it gives the others to Eigen, which is half as fast again in convolutions
# (`benchmarks/convolutions.py`) and a little faster in large matrix products. Vectors of AVX-512, where
# there are any, it takes only when told to; they make a step of many elementwise operations a
# thirtieth faster. LLVM's level 1 takes 0.6 to 0.7 of the time that XLA's level 3 takes for Toybox's
# programs, and they run as fast: what costs is in libraries, or in loops that are vectors already.
_ON_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": 512,
    "xla_backend_optimization_level": 1,
}


def networks_on(platform):
    """Options, {name: value} for `jax.jit`, for a program of networks on "cpu", "gpu" or "tpu".

    An option that the environment's XLA_FLAGS names is left to them.
    """
    if platform != "cpu" or not _known_on_cpu():
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in _ON_CPU.items() if f"--{name}=" not in flags}


def networks_here():
    """`networks_on` the devices of this machine."""
    return networks_on(jax.default_backend())


@functools.cache
def _known_on_cpu():
    """Whether this XLA still has these options, one of which is experimental."""
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            jax.jit(abs).lower(jax.ShapeDtypeStruct((), "float32")).compile(_ON_CPU)
    except jax.errors.JaxRuntimeError:
        return False
    return True
