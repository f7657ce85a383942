"""How XLA is asked to compile, where that differs from what it does by itself."""

import functools

import jax

# For programs that run seldom: compiling them well would take longer than running them badly.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}

# On a CPU XLA has YNNPACK do reductions, matrix products and convolutions. Left with reductions alone,
# it gives the others to Eigen, which is half as fast again in convolutions
# (`benchmarks/convolutions.py`) and a little faster in large matrix products. Vectors of AVX-512, where
# there are any, it takes only when told to; they make a step of many elementwise operations a
# thirtieth faster.
_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
           "xla_cpu_prefer_vector_width": 512}


def networks_on(platform):
    """Options, {name: value} for `jax.jit`, for a program of networks on "cpu", "gpu" or "tpu"."""
    return _ON_CPU if platform == "cpu" and _known_on_cpu() else {}


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
