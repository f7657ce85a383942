"""Accelerators to plan for: their memory and their speed on paper."""

import dataclasses

import jax
from jax.experimental import topologies

from focusdpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as people call it.
      memory: bytes that it has.
      flops: floating point operations a second in bfloat16, by its data sheet.
    """

    name: str
    memory: float
    flops: float


# Data sheets of cloud.google.com/tpu/docs.
TPUS = {"v4": Chip("TPU v4", 32e9, 275e12), "v5e": Chip("TPU v5e", 16e9, 197e12),
        "v5p": Chip("TPU v5p", 95e9, 459e12), "v6e": Chip("TPU v6e", 32e9, 918e12)}


def devices(topology):
    """The devices to compile for, and the Chip.

    Args:
      topology: such as "v5e:4x4", "v5p:2x2x1"; "local" takes this machine's devices.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    if topology == "local":
        found = jax.devices()
        stats = found[0].memory_stats() or {}
        return found, Chip(found[0].device_kind, stats.get("bytes_limit", 0.0), 0.0)
    kind = topology.partition(":")[0]
    if kind not in TPUS:
        raise UserError(f"--topology={topology}: give one of {', '.join(TPUS)} with its shape, such "
                        "as v5e:4x4, or local")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # Of the plugin, of several kinds.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology={topology}: no compiler for it. It comes with libtpu (pip "
                        f"install 'focusdpo_jax[plan]'), and the shape must exist: {reason}"
                        ) from error
    return described.devices, TPUS[kind]
