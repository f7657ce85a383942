"""All meshes train alike; errors of invalid meshes name valid sizes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from focusdpo_jax.errors import UserError
from focusdpo_jax.sharding import mesh, rules

TESTS = pathlib.Path(__file__).parent.parent
MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x1x8")


@pytest.fixture(scope="module")
def measured(tiny_folder):
    """The results that `eight_devices` prints for one device and for every mesh."""
    # By default the scheduler of a program for several CPU devices gathers everything at once;
    # a TPU's or GPU's keeps memory low, as this one does.
    flags = (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8 "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    result = subprocess.run(
        [
            sys.executable,
            str(TESTS / "sharding" / "eight_devices.py"),
            str(tiny_folder),
            "1x1x1",
            *MESHES,
        ],
        env=os.environ
        | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_meshes_train_like_one_device(measured):
    expected = measured["1x1x1"]["losses"]
    assert abs(expected[4] - expected[0]) > 0.005
    for sizes in MESHES:
        for step, loss in enumerate(measured[sizes]["losses"]):
            assert abs(loss - expected[step]) < 1e-5 * abs(expected[step]), (sizes, step)

    # The state is sharded. Vectors are replicated: an eighteenth of this small model.
    share = {sizes: measured[sizes]["share"] for sizes in MESHES}
    assert share["8x1x1"] == 1 and share["1x8x1"] < 1 / 8 + 1 / 18
    assert share["2x2x2"] < 0.4 and share["1x1x8"] < 0.4

    # Each trained kernel is gathered for the forward pass instead of the activations,
    # and few of them are live at once.
    gathers, (kernels, size) = measured["1x8x1"]["gathers"], measured["1x8x1"]["kernels"]
    assert gathers["count"] >= kernels and gathers["bytes"] >= 0.9 * size
    assert gathers["largest"] < 0.05 * gathers["bytes"]
    assert gathers["alive"] < size / 3

    assert len(measured["attention"]) == 9 and max(measured["attention"]) < 1e-6

    # A checkpoint of one mesh is restored on another bit by bit.
    assert measured["restored"] == {"2x1x1": True, "1x1x1": True}


def test_sharding_rules():
    # The only attribute of a mesh that the rules read.
    sizes = types.SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 4})
    spec = rules.parameter_spec
    block = ("unet", "mid_block", "attentions_0")
    assert spec((*block, "to_q", "kernel"), (64, 32), sizes) == PartitionSpec(
        ("fsdp",), ("tensor",)
    )
    assert spec((*block, "to_out_0", "kernel"), (32, 64), sizes) == PartitionSpec(
        ("tensor",), ("fsdp",)
    )
    assert spec(("unet", "conv_in", "kernel"), (3, 3, 4, 320), sizes) == PartitionSpec(
        None, None, None, ("fsdp",)
    )
    # Neither axis divides 3: the input is sharded instead, or no axis.
    assert spec(("unet", "proj_out", "kernel"), (64, 3), sizes) == PartitionSpec(("fsdp",), None)
    assert spec(("unet", "proj_out", "kernel"), (5, 3), sizes) == PartitionSpec(None, None)
    assert spec((*block, "norm", "scale"), (64,), sizes) == PartitionSpec(None)
    assert spec((*block, "to_q", "lora_b"), (8, 64), sizes) == PartitionSpec(None, ("tensor",))


@pytest.mark.parametrize(
    "sizes, batch, message",
    [
        (
            (16, 1, 1),
            16,
            r"mesh.tensor = 1 takes 16 devices and there are 8; give config.mesh.data",
        ),
        (
            (-1, 3, 1),
            6,
            r"8 devices do not divide by 3; give config.mesh.data = 8, config.mesh.fsdp",
        ),
        (
            (2, 4, 1),
            12,
            r"batch_size = 12 does not divide among the 8 devices .* give "
            r"config.batch_size = 16, or axes whose product is one of \[1, 2, 3, 4, 6\]",
        ),
    ],
)
def test_errors_of_invalid_meshes_name_valid_sizes(sizes, batch, message):
    with pytest.raises(UserError, match=message):
        mesh.make_mesh(dict(zip(mesh.AXES, sizes)), batch, [jax.devices()[0]] * 8)


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


@pytest.fixture
def ring(monkeypatch):
    """A mesh of 2 x 4 devices, whose order passes through two machines as a ring does."""
    machines = (0, 0, 1, 1, 1, 1, 0, 0)

    def indices(shape):
        size = shape[0] // len(machines)
        return {
            Device(i, machine): (slice(i * size, (i + 1) * size),)
            for i, machine in enumerate(machines)
        }

    sharding = types.SimpleNamespace(devices_indices_map=indices)
    monkeypatch.setattr(mesh, "batch_sharding", lambda made: sharding)
    return types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 1}), indices


def test_a_process_loads_the_rows_of_its_devices(ring):
    assert mesh.process_rows(ring[0], 16, 0) == [0, 1, 2, 3, 12, 13, 14, 15]
    assert mesh.process_rows(ring[0], 16, 1) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert mesh.process_rows(ring[0], 8) == [0, 1, 6, 7]  # This is process 0.


def test_rows_that_are_not_adjacent_reach_their_devices(ring, monkeypatch):
    made, indices = ring
    shards = {}

    def from_callback(shape, sharding, callback):
        for device, index in indices(shape).items():
            if device.process_index == 0:
                shards[index[0].start] = callback(index)
        return shape

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_callback", from_callback)
    local = np.array([[10], [11], [12], [13], [22], [23], [24], [25]])
    assert mesh.shard_batch({"x": local}, made) == {"x": (16, 1)}
    assert {start: shard.ravel().tolist() for start, shard in shards.items()} == {
        0: [10, 11],
        2: [12, 13],
        12: [22, 23],
        14: [24, 25],
    }


@pytest.mark.parametrize(
    "sizes, adjacent", [((16, 1, 1), False), ((4, 4, 1), False), ((8, 2, 1), True)]
)
def test_all_processes_of_a_slice_load_every_row_once(sizes, adjacent, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from focusdpo_jax.planning import targets

    made = mesh.make_mesh(dict(zip(mesh.AXES, sizes)), 32, targets.devices("v5e:4x4")[0])
    rows = [mesh.process_rows(made, 32, process) for process in range(4)]
    assert sorted(sum(rows, [])) == list(range(32))
    assert {len(part) for part in rows} == {8}
    assert all(part[-1] - part[0] == 7 for part in rows) == adjacent


def test_one_axis_takes_the_remaining_devices():
    made = mesh.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, 4)
    assert dict(made.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


def test_every_axis_is_left_to_the_partitioner():
    """Explicit axes are the default of some versions of jax, where `shard_map` refuses our inputs."""
    sizes, devices = {"data": -1, "fsdp": 1, "tensor": 1}, [jax.devices()[0]] * 2
    for made in (mesh.make_mesh(sizes, 4, devices), mesh.inference_mesh(4)):
        assert made.axis_types == (jax.sharding.AxisType.Auto,) * 3
