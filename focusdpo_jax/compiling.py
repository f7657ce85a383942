"""XLA compiler options that differ from XLA's defaults."""

import functools
import os

import jax

# For programs that run rarely: optimising them would take longer than it saves.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}

# Measured on CPUs:
# - By default XLA uses YNNPACK for reductions, matrix products and convolutions. The first option
#   limits it to reductions. Then XLA uses Eigen for the others, which is 1.5 times as fast in
#   convolutions (`benchmarks/convolutions.py`) and a little faster in large matrix products.
# - XLA uses AVX-512 vectors, if the processor has them, only with the second option. They make a
#   step with many elementwise operations 3 % faster.
# - With optimisation level 1 in LLVM the programs of Toybox compile in 0.6 to 0.7 of the time of
#   XLA's default 3 and run as fast, since most of the time is spent in libraries and in loops that
#   are already vectorised.
_ON_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": 512,
    "xla_backend_optimization_level": 1,
}
# If `fsdp` is the whole mesh, XLA's TPU backend does not gather the kernel of a large matmul. It
# multiplies by one shard of the kernel after the other, and passes the shards around a ring
# meanwhile ("windowed einsum"). By its own estimate of time a transformer block on four chips then
# takes 1.2 to 1.3 times as long (`benchmarks/tpu_layers.py`), since each of the matmuls is small
# and writes a slice of the result. This value, in MiB, is above the size of any matmul; the
# default, -1, is automatic.
_ON_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# XLA's GPU backend merges matmuls that share an operand, if one of them reads and writes less than
# this many MiB (32 by default): it concatenates their kernels in every step. If blocks are
# unrolled, these include the kernels for keys and values of the text in all blocks of SDXL, and
# those of the image tokens, 650 MB each. The adapter's update at 1024 px needs 2.97 GB of
# temporaries with the default and 1.47 GB with 0, which merges none (`plan --topology=rtx4090`).
_ON_GPU = {"xla_gpu_dot_merger_threshold_mb": 0}


def network_options(platform: str) -> dict[str, str | int]:
    """Returns compiler options for programs of neural networks: {name: value} for `jax.jit`.

    Args:
      platform: "cpu", "gpu" or "tpu". Options that the environment sets are left out: those in
        XLA_FLAGS for a CPU or a GPU, in LIBTPU_INIT_ARGS for a TPU.
    """
    options, variable = {}, ""
    if platform == "cpu" and _known_on_cpu():
        options, variable = _ON_CPU, "XLA_FLAGS"
    elif platform == "gpu":
        options, variable = _ON_GPU, "XLA_FLAGS"
    elif platform == "tpu":
        options, variable = _ON_TPU, "LIBTPU_INIT_ARGS"
    flags = os.environ.get(variable, "")
    return {name: value for name, value in options.items() if f"--{name}=" not in flags}


def default_network_options() -> dict[str, str | int]:
    """Returns `network_options` for the devices of this machine."""
    return network_options(jax.default_backend())


@functools.cache
def _known_on_cpu() -> bool:
    """Returns whether this version of XLA has these options, one of which is experimental."""
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            jax.jit(abs).lower(jax.ShapeDtypeStruct((), "float32")).compile(_ON_CPU)
    except jax.errors.JaxRuntimeError:
        return False
    return True
