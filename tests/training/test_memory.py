"""The memory that a run needs, and the memory of the device."""

import resource

import jax
import pytest
import tiny
from jax.sharding import PartitionSpec

from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import memory, shapes


def tiny_run(tmp_path, **overrides):
    """The tiny run with random weights."""
    return tiny.tiny_config(tmp_path, model__pretrained="", **overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"trainable": "full", "ema_decay": 0.9, "data__cache": False},
        {"dtype": "bfloat16", "accumulate": 2, "model__scan_layers": False},
        {"objective": "sft", "trainable": "generator"},
    ],
)
def test_what_is_held_is_what_the_step_takes(tmp_path, overrides):
    config = tiny_run(tmp_path, **overrides)
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    found = memory.held(config, mesh)
    step = shapes.abstract_step(config, mesh)
    expected = {
        "frozen parameters": step.assembly.definition.frozen["parameters"],
        "encoders": step.encoders,
        "reference": step.assembly.definition.frozen.get("reference", {}),
        "trained parameters": (step.state.trainable, step.state.average),
        "optimizer": step.state.optimizer,
    }
    assert {kind: found[kind] for kind in expected} == {
        kind: memory.bytes_per_device(tree) for kind, tree in expected.items()
    }
    trained = memory.bytes_per_device(step.state.trainable)
    assert found["gradient"] == (0 if "accumulate" in overrides else trained)
    # Two images and a mask of the image, and with each of 3 slots one of 4 bytes a pixel in all.
    images = 4 * 32 * 32 * (2 * 3 + 1 + 3 * (3 + 1 + 1))
    assert found["images"] == 0 if config.data.cache else images < found["images"] < 1.1 * images


def test_bytes_per_device_are_those_of_its_shards():
    mesh = jax.sharding.AbstractMesh((2, 4), ("a", "b"))
    tree = {"x": jax.ShapeDtypeStruct((8, 3), "float32"), "y": jax.ShapeDtypeStruct((4,), "int8")}
    divided = {
        "x": jax.sharding.NamedSharding(mesh, PartitionSpec(("a", "b"))),
        "y": jax.sharding.NamedSharding(mesh, PartitionSpec("a")),
    }
    assert memory.bytes_per_device(tree, divided) == 1 * 3 * 4 + 2
    assert memory.bytes_per_device(tree, divided["y"]) == 4 * 3 * 4 + 2


def test_more_devices_are_a_cure(tmp_path, monkeypatch):
    class Mesh:
        """Of four devices, which need not be there."""

        shape = {"data": 4, "fsdp": 1, "tensor": 1}

    monkeypatch.setattr(
        memory,
        "_total",
        lambda config, mesh: (
            8e9 / config.mesh.fsdp - 2e9 * config.data.cache + 1e9 * config.batch_size
        ),
    )
    config = tiny_run(
        tmp_path,
        trainable="lora",
        model__lora_rank=2,
        dtype="bfloat16",
        batch_size=8,
        data__cache=False,
    )
    needed = {"parameters": 8e9, "images": 8e9}
    assert memory._cure(config, Mesh, needed, 12e9) == (
        "give config.mesh.data = 1 and config.mesh.fsdp = 4 (10.0 GB), or config.batch_size = 4 and "
        "config.accumulate = 2 (12.0 GB)"
    )
    assert memory._cure(config, Mesh, needed, 5e9) == (
        "give config.data.cache = True and config.mesh.data = 1 and config.mesh.fsdp = 4 and "
        "config.batch_size = 4 and config.accumulate = 2 (4.0 GB)"
    )


def test_what_just_fits_is_not_refused(tmp_path, monkeypatch):
    config = tiny_run(tmp_path)
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    held = sum(memory.held(config, mesh).values())
    monkeypatch.setattr(memory, "limit", lambda device: held)
    assert memory.require_fit(config, mesh) == (held, held)
    monkeypatch.setattr(memory, "limit", lambda device: held - 1)
    with pytest.raises(
        UserError, match="config.trainable = 'adapter' with config.batch_size = 4 and"
    ):
        memory.require_fit(config, mesh)


FILES = {
    "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   50 kB\nSwapFree:  5 kB\nHugePages_Free: 0\n",
    "/proc/self/status": "Name:\tpython\nVmSize:\t  10 kB\nVmData:\t   3 kB\n",
    "/sys/fs/cgroup/memory.max": "max\n",
    "/sys/fs/cgroup/a/memory.max": "40960\n",
    "/sys/fs/cgroup/a/memory.current": "20480\n",
    "/sys/fs/cgroup/a/memory.stat": "anon 7168\ninactive_file 2048\nactive_file 1024\n",
    "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "30720\n",
    "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "30720\n",
    "/sys/fs/cgroup/memory/job/memory.stat": "inactive_file 5\ntotal_inactive_file 2048\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
}


@pytest.mark.parametrize(
    "changes, limits, expected",
    [
        ({}, {}, 55),
        ({"/proc/self/cgroup": "0::/a/b\n"}, {}, 40 - 20 + 3 + 5),
        ({"/proc/self/cgroup": "9:cpu:/job\n4:memory:/job\n0::/\n"}, {}, 30 - 30 + 2 + 5),
        ({}, {resource.RLIMIT_AS: 30}, 20),
        ({}, {resource.RLIMIT_DATA: 7}, 4),
        ({}, {resource.RLIMIT_AS: 9}, 0),
    ],
)
def test_free_memory_of_a_cpu(monkeypatch, changes, limits, expected):
    files = FILES | changes
    monkeypatch.setattr(memory, "_text", lambda path: files.get(str(path), ""))
    monkeypatch.setattr(
        resource,
        "getrlimit",
        lambda kind: (
            limits[kind] * 1024 if kind in limits else resource.RLIM_INFINITY,
            resource.RLIM_INFINITY,
        ),
    )
    assert memory.limit(jax.devices()[0]) == expected * 1024


def test_memory_of_an_accelerator_is_what_its_allocator_has():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory.limit(Device({"bytes_limit": 12, "bytes_in_use": 3})) == 12
    assert memory.limit(Device(None)) is None
