"""Accelerators: their memory and the speeds of their data sheets."""

import dataclasses
from typing import Any

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
