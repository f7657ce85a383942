"""Devices to compile for that need not be present: TPU slices and NVIDIA GPUs."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from focusdpo_jax.errors import UserError
from focusdpo_jax.profiling import chips

# Share of a GPU's memory that JAX allocates unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
_GPU_SHARE = 0.75
# Options of the TPU compiler besides the shape. Without this option the two cores of v4 are two
# devices.
_TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}

_PROTO = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]}{extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{description}"
"""


def target_config(gpu: chips.GPU) -> str:
    """Returns XLA's description of a GPU to compile for, a GpuTargetConfigProto in text form."""
    # These architectures have additional instructions that later ones do not support.
    accelerated = gpu.capability in ((9, 0), (10, 0))
    return _PROTO.format(
        **dataclasses.asdict(gpu),
        extension=(" feature_extension: ACCELERATED_FEATURES" if accelerated else ""),
    )


def devices(topology: str) -> tuple[list[Any], chips.Chip]:
    """Returns the devices to compile for, and their `Chip`.

    Args:
      topology: such as "v5e:4x4", "v5p:2x2x1", "v5e:1x1"; "h100" or "h100:16", which is two
        machines of eight; "local" for this machine's devices.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    if topology == "local":
        local = jax.devices()
        stats = local[0].memory_stats() or {}
        return local, chips.Chip(
            local[0].device_kind, stats.get("bytes_limit", 0.0), 0.0, per_host=len(local)
        )
    kind, _, shape = topology.partition(":")
    if kind in chips.GPUS:
        return _gpus(topology, kind, shape)
    if kind not in chips.TPUS:
        raise UserError(
            f"--topology={topology}: give a TPU slice, {', '.join(chips.TPUS)} with its shape, "
            f"such as v5e:4x4; GPUs, {', '.join(chips.GPUS)} and how many, such as h100:8; or "
            "local"
        )
    options: dict[str, Any] = dict(_TPU_OPTIONS.get(kind, {}))
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # The plugin raises several types.
        raise _no_compiler(topology, "libtpu", "plan", error) from error
    return list(described.devices), chips.TPUS[kind]


def _gpus(topology: str, kind: str, shape: str) -> tuple[list[Any], chips.Chip]:
    count = int(shape) if shape.isdecimal() else 0 if shape else 1
    if not count or count > chips.PER_HOST and count % chips.PER_HOST:
        raise UserError(
            f"--topology={topology}: give a number of GPUs after the colon, up to {chips.PER_HOST} "
            f"in one machine or a multiple of {chips.PER_HOST}, such as {kind}:8"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"--topology={topology}: no compiler for NVIDIA GPUs here; it comes with pip "
            "install 'focusdpo_jax[plan-gpu]' and needs no GPU"
        )
    gpu, hosts = chips.GPUS[kind], -(-count // chips.PER_HOST)
    try:
        # The topology is slices x machines per slice x GPUs per machine.
        described = topologies.get_topology_desc(
            gpu.description,
            "cuda",
            target_config=target_config(gpu),
            topology=f"1x{hosts}x{count // hosts}",
        )
    except Exception as error:
        raise _no_compiler(topology, "jax's CUDA plugin", "plan-gpu", error) from error
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_SHARE))
    return list(described.devices), chips.Chip(
        gpu.description,
        share * gpu.memory,
        gpu.flops,
        gpu.bandwidth,
        gpu.link,
        gpu.network,
        per_host=chips.PER_HOST,
        memory_note=f"{share:.0%} of {gpu.memory / 1e9:.1f} GB, which is JAX's share "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION)",
    )


def _no_compiler(topology: str, name: str, extra: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"--topology={topology}: no compiler for it. It comes with {name} (pip install "
        f"'focusdpo_jax[{extra}]'), and the shape must exist: {reason}"
    )
