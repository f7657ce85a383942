"""The device mesh, and how batches and states lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from focusdpo_jax.errors import UserError


def make_mesh(data, batch_size):
    """A mesh with the one axis "data".

    Args:
      data: number of devices, or -1 for all there are.
      batch_size: pairs a step, which the devices share equally.

    Raises:
      UserError: there are fewer devices, or the batch does not divide among them.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if count > len(devices):
        raise UserError(f"config.mesh.data = {data}: there are only {len(devices)} devices; "
                        "give -1 to use all of them")
    if batch_size % count:
        good = [n for n in range(1, len(devices) + 1) if batch_size % n == 0]
        raise UserError(f"config.batch_size = {batch_size} does not divide among "
                        f"config.mesh.data = {count} devices; use one of {good} devices")
    return Mesh(np.asarray(devices[:count]), ("data",))


def drawing_mesh(batch_size):
    """A mesh of as many of this process's devices as a batch divides among.

    Args:
      batch_size: pictures drawn or scored at once.
    """
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.asarray(devices[:count]), ("data",))


def replicated(mesh):
    """The sharding of an array that lies on each device as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh):
    """Places a whole copy of every array on each device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(batch, mesh):
    """Places host arrays [B, ...], each device getting its share of the examples."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
