"""The device mesh, and how batches lie on it.

A mesh has three axes. `data` divides the batch; `fsdp` divides it as well, and with it the
parameters, which are gathered layer by layer where they are used; `tensor` divides the inside of
layers (heads, hidden units, channels). `rules` says which axis of which parameter is divided.
"""

import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from focusdpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Those that divide a batch.
BATCH_AXES = ("data", "fsdp")
# XLA places what the program does not constrain. With explicit axes (the default of some constructors
# and jax versions) `shard_map` refuses inputs that are placed otherwise than its `in_specs`.
_AXIS_TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(sizes, batch_size, devices=None):
    """A mesh over devices.

    Args:
      sizes: {axis: number of devices} for each of `AXES`; -1 in one place takes what the others
        leave.
      batch_size: pairs a step, which `data` and `fsdp` share equally.
      devices: all there are if None. One process may leave some idle; several use all of theirs.

    Raises:
      UserError: the devices do not suffice, or the batch does not divide; it names what would do.
    """
    devices = jax.devices() if devices is None else list(devices)
    filled = _fill(sizes, len(devices))
    count = math.prod(filled.values())
    if count > len(devices) or count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"{_named(sizes)} takes {count} devices and there are {len(devices)}; "
            f"give {_good_split(sizes, len(devices))}"
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
        # Neighbours on the mesh are neighbours in the machine.
        return Mesh(mesh_utils.create_device_mesh(shape, devices[:count]), AXES, _AXIS_TYPES)
    return Mesh(np.asarray(devices[:count]).reshape(shape), AXES, _AXIS_TYPES)


def _fill(sizes, count):
    """`sizes` with the one -1 replaced by what is left of `count` devices."""
    fixed = math.prod(sizes[axis] for axis in AXES if sizes[axis] != -1)
    if [sizes[axis] for axis in AXES].count(-1) and count % fixed:
        raise UserError(
            f"{_named(sizes)}: {count} devices do not divide by {fixed}; give "
            f"{_good_split(sizes, count)}"
        )
    return {axis: count // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES}


def _good_split(sizes, count):
    """Sizes near those asked for whose product is the number of devices, in words."""
    tensor = math.gcd(max(sizes["tensor"], 1), count)
    fsdp = math.gcd(max(sizes["fsdp"], 1), count // tensor)
    split = {"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
    return _named(split)


def _named(sizes):
    return ", ".join(f"config.mesh.{axis} = {sizes[axis]}" for axis in AXES)


def drawing_mesh(batch_size):
    """A mesh of as many of this process's devices as a batch divides among.

    Args:
      batch_size: pictures drawn or scored at once.
    """
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.asarray(devices[:count]).reshape(count, 1, 1), AXES, _AXIS_TYPES)


def replicated(mesh):
    """The sharding of an array that lies on each device as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shares(mesh):
    """How many equal parts a batch is divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh):
    """The sharding of an array whose first axis are the examples of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_share(mesh, batch_size):
    """Which part of every batch this process has to hold: (index, number of parts).

    Processes among which only `tensor` is divided hold the same part.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = [rows.indices(batch_size)[0] for (rows,) in places]
    stops = [rows.indices(batch_size)[1] for (rows,) in places]
    held = max(stops) - min(starts)
    return min(starts) // held, batch_size // held


def replicate(tree, mesh):
    """Places a whole copy of every array on each device."""
    return jax.device_put(tree, replicated(mesh))


def random_key(seed, mesh):
    """The key of a seed on every device; jax does not send keys to those of other processes."""
    return jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated(mesh))(seed)


def shard_batch(batch, mesh):
    """Places a batch of which this process has its part (`batch_share`).

    Args:
      batch: pytree of host arrays [B / parts, ...].

    Returns:
      Global arrays [B, ...], each device with its share.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return _placed_by_call(sharding)(batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


@functools.cache
def _placed_by_call(sharding):
    """A function that places a tree: `jax.device_put` takes four times as long for many arrays."""
    return jax.jit(lambda tree: tree, in_shardings=sharding, out_shardings=sharding)


def placed_shapes(tree, shardings):
    """Returns a tree of shapes with these shardings, a tree of them or one for all leaves."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def shard_rows(tree, mesh):
    """Places arrays [N, ...] of which every process holds all, divided if N allows it.

    What encoding and drawing take: batches of other sizes than training's.
    """
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def place(x):
        x = np.asarray(x)
        sharding = replicated(mesh) if len(x) % shares else batch_sharding(mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def fetch(tree):
    """The arrays of a tree as numpy, on every process as a whole."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
