"""Checks from shapes whether parameters and optimiser fit in memory, before anything is built.

The result is a lower bound: the bytes that a device holds during every step. Activations and
temporaries are only known from the compiled program; `planner` adds them.
"""

import math
import resource
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from focusdpo_jax import config as config_lib
from focusdpo_jax.config import RunConfig
from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import models, shapes
from focusdpo_jax.training.assembly import assemble
from focusdpo_jax.training.state import create_state, make_optimizer

# Control groups without a limit report a number near the largest integer.
_NO_LIMIT = 1 << 60
# Limits of a process, and the fields in which Linux reports their usage.
_PROCESS_LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
# Rank of the low-rank updates that a message proposes.
_RANK = 32


def held(config: RunConfig, mesh: Mesh) -> dict[str, int]:
    """Returns the bytes that each device holds during every step, by kind.

    Args:
      config: a `RunConfig` with a generator's objective, whose files exist.
      mesh: device mesh.

    Returns:
      {kind: bytes}: "frozen parameters", "encoders", "reference", "trained parameters",
      "optimizer", "gradient" and "images".

    Raises:
      UserError: the model lacks the part that `config.trainable` names.
    """
    # Stacked layers have the same bytes in fewer arrays.
    config = config_lib.replace(config, {"model.scan_layers": True})
    generator, parameters = models.abstract_model(config, mesh)
    empty = np.zeros((2, generator.config.text_encoder.max_length), np.int32)
    assembly = assemble(config, generator, parameters, empty, mesh)
    trainable, frozen, parts = assembly.trainable, assembly.untrained, assembly.step.parts
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda tree: create_state(tree, optimizer, config.ema_decay), trainable)
    shardings = shapes.state_shardings(state, mesh)
    sizes = {
        "frozen parameters": bytes_per_device(
            {part: tree for part, tree in frozen.items() if part in parts}
        ),
        "encoders": 0
        if config.data.cache
        else bytes_per_device({part: tree for part, tree in frozen.items() if part not in parts}),
        "reference": bytes_per_device(assembly.definition.frozen.get("reference", {})),
        "trained parameters": bytes_per_device(
            (state.trainable, state.average), (shardings.trainable, shardings.average)
        ),
        "optimizer": bytes_per_device(state.optimizer, shardings.optimizer),
        # Clipping by the global norm needs the whole gradient at once. With accumulation the
        # optimiser's sum of gradients, which is counted above, takes its place.
        "gradient": 0 if config.accumulate > 1 else bytes_per_device(trainable),
        # Without the cache, encoders read every batch of images on the device.
        "images": 0
        if config.data.cache
        else bytes_per_device(shapes.raw_batch(config, generator), meshes.batch_sharding(mesh)),
    }
    return sizes


def bytes_per_device(tree: Any, shardings: Any = None) -> int:
    """Returns the bytes per device of a sharded tree of arrays or shapes.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      shardings: a tree of shardings like `tree`, or one for all leaves; None uses the leaves' own.
    """
    leaves = jax.tree.leaves(tree)
    if shardings is None:
        shardings = [leaf.sharding for leaf in leaves]
    elif isinstance(shardings, jax.sharding.Sharding):
        shardings = [shardings] * len(leaves)
    else:
        shardings = jax.tree.leaves(shardings)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, shardings, strict=True)
    )


def limit(device: Any) -> int | None:
    """Returns the memory of a `jax.Device` of this process in bytes, or None if it is unknown.

    For a CPU it is the free memory of this machine under the limits of the process and of its
    control group; all CPU devices of a process share it.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [*_machine(), *_process(), *_control_groups()]
    return min(limits) if limits else None


def require_fit(config: RunConfig, mesh: Mesh) -> tuple[int, int | None]:
    """Compares the bytes that a run holds with the memory of the devices.

    Args:
      config, mesh: see `held`.

    Returns:
      (bytes held, bytes available or None), per device.

    Raises:
      UserError: the memory is too small; the message names fields that reduce the bytes.
    """
    device = mesh.local_devices[0]
    available = limit(device)
    if available is not None and device.platform == "cpu":
        available //= len(mesh.local_devices)
    needed = held(config, mesh)
    total = sum(needed.values())
    if available is None or total <= available:
        return total, available
    listed = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in needed.items() if size)
    raise UserError(
        f"config.trainable = {config.trainable!r} with config.batch_size = {config.batch_size} and "
        f"config.data.cache = {config.data.cache} holds {total / 1e9:.1f} GB on each device before "
        f"activations ({listed}), and {device.device_kind} has {available / 1e9:.1f} GB: "
        f"{_cure(config, mesh, needed, available)}"
    )


def _cure(config: RunConfig, mesh: Mesh, needed: Mapping[str, int], available: int) -> str:
    """Returns the end of a message: the fields that would make a run fit.

    Args:
      config, mesh, needed: arguments and result of `held`.
      available: memory of a device in bytes.
    """
    alone = [
        (changes, _total(config_lib.replace(config, changes), mesh))
        for changes in _savings(config, mesh, needed)
    ]
    fitting = [
        f"{_named(changes)} ({size / 1e9:.1f} GB)" for changes, size in alone if size <= available
    ]
    if fitting:
        return "give " + ", or ".join(fitting)
    together: dict[str, Any] = {}
    least = sum(needed.values())
    for changes, size in alone:
        if together:
            size = _total(config_lib.replace(config, together | changes), mesh)
        if size < least:
            together, least = together | changes, size
        if least <= available:
            return f"give {_named(together)} ({least / 1e9:.1f} GB)"
    even = f"even with {_named(together)} it is {least / 1e9:.1f} GB; " if together else ""
    return even + "use devices with more memory, or more of them with config.mesh.fsdp"


def _savings(config: RunConfig, mesh: Mesh, needed: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yields changes that save memory, those with the smallest effect on training first."""
    if not config.data.cache:
        yield {"data.cache": True}
    shares = math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES)
    if mesh.shape["fsdp"] < shares:
        yield {"mesh.data": 1, "mesh.fsdp": shares}
    if config.batch_size > shares and needed["images"] > sum(needed.values()) / 100:
        # Keeps the number of pairs per update.
        yield {
            "batch_size": shares,
            "accumulate": config.accumulate * (config.batch_size // shares),
        }
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if config.ema_decay:
        yield {"ema_decay": 0.0}
    if config.trainable in ("adapter", "full"):
        yield {"trainable": "lora"} | ({} if config.model.lora_rank else {"model.lora_rank": _RANK})


def _total(config: RunConfig, mesh: Mesh) -> int:
    """Returns the bytes per device of a configuration on its own mesh over the same devices."""
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size, list(mesh.devices.flat))
    return sum(held(config, mesh).values())


def _named(changes: Mapping[str, Any]) -> str:
    return " and ".join(f"config.{field} = {value!r}" for field, value in changes.items())


def _machine() -> Iterator[int]:
    """Yields the free bytes of memory and swap."""
    entries = dict(_entries("/proc/meminfo"))
    if "MemAvailable" in entries:
        yield entries["MemAvailable"] + entries.get("SwapFree", 0)


def _process() -> Iterator[int]:
    """Yields the bytes that remain under the limits of the process (ulimit -v, ulimit -d)."""
    used = dict(_entries("/proc/self/status"))
    for kind, name in _PROCESS_LIMITS:
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY and name in used:
            yield max(soft - used[name], 0)


def _control_groups() -> Iterator[int]:
    """Yields the bytes that remain under the limits of this process's control groups (v1 or v2).

    Their usage includes cached pages of files, which the kernel frees when memory is needed.
    """
    swap = dict(_entries("/proc/meminfo")).get("SwapFree", 0)
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, most, now, prefix = (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        elif not controllers:
            root, most, now, prefix = "/sys/fs/cgroup", "memory.max", "memory.current", ""
        else:
            continue
        folder = epath.Path(root) / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            allowed, used = _text(group / most).strip(), _text(group / now).strip()
            if not (allowed.isdigit() and used.isdigit()) or int(allowed) >= _NO_LIMIT:
                continue
            stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield max(int(allowed) - int(used) + files, 0) + swap


def _entries(path: str) -> Iterator[tuple[str, int]]:
    """Yields (name, bytes) of lines such as "MemTotal:  16384 kB" of a file in /proc."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            yield name, 1024 * int(value.split()[0])


def _text(path: epath.PathLike) -> str:
    """Returns the content of a file, or "" if it cannot be read."""
    try:
        return epath.Path(path).read_text()
    except OSError:
        return ""
