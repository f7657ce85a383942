"""Device, versions of libraries, and the device's speed in a large matrix product."""

import importlib.metadata
import os
from typing import Any

import jax

from focusdpo_jax.profiling.peak_flops import matmul_peak

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "numpy")


def measure(settings: Any, context: Any):
    """Yields a single row."""
    del settings, context
    device = jax.devices()[0]
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    yield {
        "key": "device",
        "name": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "processors": os.cpu_count(),
        "versions": versions,
        "matmul_peak": matmul_peak(device, "bfloat16"),
    }
