"""The device mesh, and the placement of batches on it.

A mesh has three axes. `data` shards the batch. `fsdp` shards the batch, too, and the parameters,
which are gathered layer by layer where they are used. `tensor` shards the inside of layers (heads,
hidden units, channels). `rules` maps the axes of parameters to those of the mesh.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from focusdpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# The axes that shard a batch.
BATCH_AXES = ("data", "fsdp")
# XLA places what the program does not constrain. With explicit axes (the default of some
# constructors and jax versions) `shard_map` refuses inputs that are placed otherwise than its
# `in_specs`.
_AXIS_TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(
    sizes: Mapping[str, int], batch_size: int, devices: Sequence[Any] | None = None
) -> Mesh:
    """Creates a mesh over devices.

    Args:
      sizes: {axis: number of devices} for each of `AXES`; one of them may be -1, for all devices
        that the others leave.
      batch_size: pairs per step; a multiple of `data` times `fsdp`.
      devices: `jax.Device`s; all devices if None. A single process may leave some of them idle;
        several processes must use all of theirs.

    Raises:
      UserError: there are too few devices, or the batch does not divide; the message has valid
        values.
    """
    devices = jax.devices() if devices is None else list(devices)
    filled = _resolve_sizes(sizes, len(devices))
    count = math.prod(filled.values())
    if count > len(devices) or count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"{_format_sizes(sizes)} takes {count} devices and there are {len(devices)}; "
            f"give {_suggest_sizes(sizes, len(devices))}"
        )
    shares = math.prod(filled[axis] for axis in BATCH_AXES)
    if batch_size % shares:
        multiple = -(-batch_size // shares) * shares
        raise UserError(
            f"config.batch_size = {batch_size} does not divide among the {shares} devices of "
            f"config.mesh.data = {filled['data']} times config.mesh.fsdp = {filled['fsdp']}; give "
            f"config.batch_size = {multiple}, or axes whose product is one of "
            f"{[n for n in range(1, len(devices) + 1) if batch_size % n == 0]}"
        )
    shape = tuple(filled[axis] for axis in AXES)
    if devices[0].platform == "tpu":
        # Orders devices so that neighbours in the mesh are neighbours in the interconnect.
        # An axis of the mesh may be part of one axis of the interconnect.
        ordered = mesh_utils.create_device_mesh(
            shape, devices[:count], allow_split_physical_axes=True
        )
        return Mesh(ordered, AXES, _AXIS_TYPES)
    return Mesh(np.asarray(devices[:count]).reshape(shape), AXES, _AXIS_TYPES)


def _resolve_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Returns `sizes` with -1 replaced by the quotient of `count` and the other sizes."""
    fixed = math.prod(sizes[axis] for axis in AXES if sizes[axis] != -1)
    if [sizes[axis] for axis in AXES].count(-1) and count % fixed:
        raise UserError(
            f"{_format_sizes(sizes)}: {count} devices do not divide by {fixed}; give "
            f"{_suggest_sizes(sizes, count)}"
        )
    return {axis: count // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES}


def _suggest_sizes(sizes: Mapping[str, int], count: int) -> str:
    """Formats sizes close to `sizes` whose product is `count`, for a message."""
    tensor = math.gcd(max(sizes["tensor"], 1), count)
    fsdp = math.gcd(max(sizes["fsdp"], 1), count // tensor)
    return _format_sizes({"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor})


def _format_sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"config.mesh.{axis} = {sizes[axis]}" for axis in AXES)


def inference_mesh(batch_size: int) -> Mesh:
    """Creates a mesh for generating and scoring images, of this process's devices.

    Args:
      batch_size: images at once. The mesh has the largest number of devices that divides it.
    """
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.asarray(devices[:count]).reshape(count, 1, 1), AXES, _AXIS_TYPES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array [B, ...] over the examples of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> list[int]:
    """Returns the rows of every batch [B, ...] that a process loads, ascending.

    They need not be adjacent: a mesh of TPUs follows their interconnect, which passes through the
    machines in any order. Processes that differ only in the axis `tensor` load the same rows.

    Args:
      mesh: the mesh.
      batch_size: B, a multiple of the batch shards.
      process: index of the process; this one if None.
    """
    process = jax.process_index() if process is None else process
    indices = batch_sharding(mesh).devices_indices_map((batch_size,))
    rows = {
        row
        for device, index in indices.items()
        if device.process_index == process
        for row in range(*index[0].indices(batch_size))
    }
    return sorted(rows)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a full copy of every array of a pytree on each device."""
    return jax.device_put(tree, replicated(mesh))


def random_key(seed: int, mesh: Mesh) -> PRNGKeyArray:
    """Returns the PRNG key of a seed on every device.

    It is computed under jit, since jax cannot transfer keys to devices of other processes.
    """
    return jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated(mesh))(seed)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a batch on the devices; each process gives its rows (`process_rows`).

    Args:
      batch: pytree of host arrays [rows, ...].

    Returns:
      A pytree of global arrays [B, ...], sharded over the examples.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return _jitted_identity(sharding)(batch)
    shares = num_batch_shards(mesh)
    # {shard of the batch: its position among the shards of this process}.
    held = {shard: i for i, shard in enumerate(process_rows(mesh, shares))}

    def place(x):
        size = len(x) // len(held)  # Rows of a shard.

        def rows(index):
            first = held[(index[0].start or 0) // size] * size
            return x[first : first + size]

        return jax.make_array_from_callback((size * shares, *x.shape[1:]), sharding, rows)

    return jax.tree.map(place, batch)


@functools.cache
def _jitted_identity(sharding: NamedSharding) -> Callable[[Any], Any]:
    """Returns a jitted identity, four times as fast as `jax.device_put` for many arrays."""
    return jax.jit(lambda tree: tree, in_shardings=sharding, out_shardings=sharding)


def placed_shapes(tree: Any, shardings: Any) -> Any:
    """Returns a pytree of shapes with shardings.

    Args:
      tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: a pytree of shardings like `tree`, or one sharding for all leaves.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Places arrays [N, ...] that every process holds in full; for encoding and inference.

    They are sharded over N if it divides, and replicated otherwise.
    """
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def place(x):
        x = np.asarray(x)
        sharding = replicated(mesh) if len(x) % shares else batch_sharding(mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def fetch(tree: Any) -> Any:
    """Returns a pytree of global arrays as full numpy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
