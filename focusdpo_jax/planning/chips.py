"""Accelerators to plan for: their memory, data sheet speeds, and compile-only devices."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from focusdpo_jax.errors import UserError

# Share of a GPU's memory that JAX allocates unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
_GPU_SHARE = 0.75
_GIB = 2**30
# GPUs of one machine, in servers of eight.
PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: common name.
      memory: bytes that a run can use.
      flops: dense bfloat16 floating-point operations per second, from the data sheet.
      bandwidth: memory bandwidth in bytes per second, from the data sheet.
      link: bytes per second received from other chips of its machine or slice; see `TPUS`, `GPUS`.
      network: bytes per second received from other machines, if these use another network.
      clock: cycles per second to which the TPU compiler's estimates refer; 0 for GPUs.
      per_host: number of chips of one machine.
      memory_note: explains how `memory` is derived, if needed.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    clock: float = 0.0
    per_host: int = 4
    memory_note: str = ""


# Memory: the compiler's limit for programs. Speeds: cloud.google.com/tpu/docs. Clocks: chosen so
# that the matrix units' operations per cycle (v4 and v5p 8 x 128 x 128 x 2, v5e 4 x 128 x 128 x 2,
# v6e 4 x 256 x 256 x 2) give the speed of the data sheet. The compiler's estimates for a product of
# 4096^3 amount to 92 %, 98 %, 96 % and 91 % of these operations per cycle (v4, v5e, v5p, v6e).
# Link: one axis of the torus in both directions, as used by a ring.
TPUS = {
    "v4": Chip("TPU v4", 30.75 * _GIB, 275e12, 1228e9, 90e9, 0.0, 1.05e9),
    "v5e": Chip("TPU v5e", 15.75 * _GIB, 197e12, 819e9, 90e9, 0.0, 1.5e9),
    "v5p": Chip("TPU v5p", 95.74 * _GIB, 459e12, 2765e9, 180e9, 0.0, 1.75e9),
    "v6e": Chip("TPU v6e", 31.25 * _GIB, 918e12, 1640e9, 180e9, 0.0, 1.75e9),
}
# Options of the TPU compiler besides the shape. Without this option the two cores of v4 are two
# devices.
_TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


@dataclasses.dataclass(frozen=True)
class GPU:
    """The parameters of a GPU that XLA's compiler needs, and its speeds.

    Attributes:
      description: name that the driver reports.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors.
      fpus: float32 units per multiprocessor.
      clock: clock rate in GHz.
      memory: bytes that the driver reports.
      bandwidth: memory bandwidth in bytes per second.
      cache: bytes of the L2 cache.
      shared: bytes of shared memory per multiprocessor.
      block: bytes of shared memory that one block may use.
      threads: threads per multiprocessor.
      flops: dense bfloat16 operations per second with float32 accumulation.
      link: bytes per second received from other GPUs of its machine, by NVLink or PCIe.
      network: bytes per second received from other machines. This is an assumption: 400, 200 or 100
        Gbit/s per GPU if common servers have that (DGX H100, DGX A100), otherwise 100 Gbit/s for
        eight GPUs.
    """

    description: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    clock: float
    memory: int
    bandwidth: float
    cache: int
    shared: int
    block: int
    threads: int
    flops: float
    link: float
    network: float


_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "fpus": 128,
    "shared": 233472,
    "block": 232448,
    "threads": 2048,
}
_AMPERE: dict[str, Any] = {
    "capability": (8, 0),
    "fpus": 64,
    "shared": 167936,
    "block": 166912,
    "threads": 2048,
}
_ADA: dict[str, Any] = {
    "capability": (8, 9),
    "fpus": 128,
    "shared": 102400,
    "block": 101376,
    "threads": 1536,
}
_BLACKWELL: dict[str, Any] = {
    "capability": (10, 0),
    "fpus": 128,
    "shared": 233472,
    "block": 232448,
    "threads": 2048,
}
_BLACKWELL_RTX: dict[str, Any] = {
    "capability": (12, 0),
    "fpus": 128,
    "shared": 131072,
    "block": 101376,
    "threads": 1536,
}
_PCIE4, _PCIE5, _SHARED_NETWORK = 32e9, 64e9, 12.5e9 / PER_HOST

# h100, h100-pcie, h200, a100-*, a6000, b200 and rtx6000pro: sizes and memory from XLA's own
# descriptions (openxla/xla, xla/backends/gpu/target_config/specs, 2026). The others, and all
# speeds: NVIDIA's data sheets, quoted from memory and not verified.
GPUS = {
    "h100": GPU(
        "NVIDIA H100 80GB HBM3",
        cores=132,
        clock=1.98,
        memory=84942979072,
        bandwidth=3352.32e9,
        cache=52428800,
        flops=989e12,
        link=450e9,
        network=50e9,
        **_HOPPER,
    ),
    "h100-pcie": GPU(
        "NVIDIA H100 PCIe",
        cores=114,
        clock=1.755,
        memory=84942979072,
        bandwidth=2039.04e9,
        cache=52428800,
        flops=756e12,
        link=_PCIE5,
        network=_SHARED_NETWORK,
        **_HOPPER,
    ),
    "h200": GPU(
        "NVIDIA H200 141GB HBM3e",
        cores=132,
        clock=1.98,
        memory=151397597184,
        bandwidth=4800e9,
        cache=52428800,
        flops=989e12,
        link=450e9,
        network=50e9,
        **_HOPPER,
    ),
    "b200": GPU(
        "NVIDIA B200",
        cores=148,
        clock=1.965,
        memory=191514411008,
        bandwidth=7672.32e9,
        cache=132644864,
        flops=2250e12,
        link=900e9,
        network=50e9,
        **_BLACKWELL,
    ),
    "a100-40": GPU(
        "NVIDIA A100-SXM4-40GB",
        cores=108,
        clock=1.41,
        memory=42331013120,
        bandwidth=1555.2e9,
        cache=41943040,
        flops=312e12,
        link=300e9,
        network=25e9,
        **_AMPERE,
    ),
    "a100-80": GPU(
        "NVIDIA A100-SXM4-80GB",
        cores=108,
        clock=1.41,
        memory=85100068864,
        bandwidth=2039.04e9,
        cache=41943040,
        flops=312e12,
        link=300e9,
        network=25e9,
        **_AMPERE,
    ),
    "a6000": GPU(
        "NVIDIA RTX A6000",
        cores=84,
        clock=1.8,
        memory=51041271808,
        bandwidth=768.096e9,
        cache=6291456,
        flops=154.8e12,
        link=_PCIE4,
        network=_SHARED_NETWORK,
        **{**_ADA, "capability": (8, 6)},
    ),
    "l4": GPU(
        "NVIDIA L4",
        cores=58,
        clock=2.04,
        memory=23580639232,
        bandwidth=300e9,
        cache=50331648,
        flops=121e12,
        link=_PCIE4,
        network=_SHARED_NETWORK,
        **_ADA,
    ),
    "l40s": GPU(
        "NVIDIA L40S",
        cores=142,
        clock=2.52,
        memory=47810936832,
        bandwidth=864e9,
        cache=100663296,
        flops=362e12,
        link=_PCIE4,
        network=_SHARED_NETWORK,
        **_ADA,
    ),
    "rtx4090": GPU(
        "NVIDIA GeForce RTX 4090",
        cores=128,
        clock=2.52,
        memory=25386352640,
        bandwidth=1008e9,
        cache=75497472,
        flops=165.2e12,
        link=_PCIE4,
        network=_SHARED_NETWORK,
        **_ADA,
    ),
    "rtx5090": GPU(
        "NVIDIA GeForce RTX 5090",
        cores=170,
        clock=2.407,
        memory=34190458880,
        bandwidth=1792e9,
        cache=100663296,
        flops=209.5e12,
        link=_PCIE5,
        network=_SHARED_NETWORK,
        **_BLACKWELL_RTX,
    ),
    "rtx6000pro": GPU(
        "NVIDIA RTX PRO 6000 Blackwell",
        cores=188,
        clock=2.6,
        memory=103079215104,
        bandwidth=1792e9,
        cache=134217728,
        flops=503.8e12,
        link=_PCIE5,
        network=_SHARED_NETWORK,
        **_BLACKWELL_RTX,
    ),
}

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


def target_config(gpu: GPU) -> str:
    """Returns XLA's description of a GPU to compile for: a GpuTargetConfigProto in text form."""
    # These architectures have additional instructions that later ones do not support.
    accelerated = gpu.capability in ((9, 0), (10, 0))
    return _PROTO.format(
        **dataclasses.asdict(gpu),
        extension=(" feature_extension: ACCELERATED_FEATURES" if accelerated else ""),
    )


def devices(topology: str) -> tuple[list[Any], Chip]:
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
        return local, Chip(
            local[0].device_kind, stats.get("bytes_limit", 0.0), 0.0, per_host=len(local)
        )
    kind, _, shape = topology.partition(":")
    if kind in GPUS:
        return _gpus(topology, kind, shape)
    if kind not in TPUS:
        raise UserError(
            f"--topology={topology}: give a TPU slice, {', '.join(TPUS)} with its shape, "
            f"such as v5e:4x4; GPUs, {', '.join(GPUS)} and how many, such as h100:8; or "
            "local"
        )
    options: dict[str, Any] = dict(_TPU_OPTIONS.get(kind, {}))
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # The plugin raises several types.
        raise _no_compiler(topology, "libtpu", "plan", error) from error
    return list(described.devices), TPUS[kind]


def _gpus(topology: str, kind: str, shape: str) -> tuple[list[Any], Chip]:
    count = int(shape) if shape.isdecimal() else 0 if shape else 1
    if not count or count > PER_HOST and count % PER_HOST:
        raise UserError(
            f"--topology={topology}: give a number of GPUs after the colon, up to {PER_HOST} "
            f"in one machine or a multiple of {PER_HOST}, such as {kind}:8"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"--topology={topology}: no compiler for NVIDIA GPUs here; it comes with pip "
            "install 'focusdpo_jax[plan-gpu]' and needs no GPU"
        )
    gpu, hosts = GPUS[kind], -(-count // PER_HOST)
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
    return list(described.devices), Chip(
        gpu.description,
        share * gpu.memory,
        gpu.flops,
        gpu.bandwidth,
        gpu.link,
        gpu.network,
        per_host=PER_HOST,
        memory_note=f"{share:.0%} of {gpu.memory / 1e9:.1f} GB, which is JAX's share "
        "(XLA_PYTHON_CLIENT_MEM_FRACTION)",
    )


def _no_compiler(topology: str, name: str, extra: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"--topology={topology}: no compiler for it. It comes with {name} (pip install "
        f"'focusdpo_jax[{extra}]'), and the shape must exist: {reason}"
    )
