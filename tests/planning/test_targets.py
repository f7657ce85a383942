"""Devices to compile for that are absent, and errors for invalid topologies."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import targets
from focusdpo_jax.profiling import chips, collectives

needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
    reason="no compiler for NVIDIA GPUs: pip install -e '.[plan-gpu]'",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e '.[plan]'"
)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:4x4", "give a TPU slice, v4, v5e, v5p, v6e with its shape, .*; GPUs, h100, .*rtx4090"),
        (
            "h100:0",
            "--topology=h100:0: give a number of GPUs after the colon, up to 8 .* such as h100:8",
        ),
        ("h100:12", "or a multiple of 8"),
        ("l4:2x2", "give a number of GPUs"),
    ],
)
def test_invalid_topologies_are_refused_with_valid_ones(name, message):
    with pytest.raises(UserError, match=message):
        targets.devices(name)


def test_a_missing_plugin_is_named(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'focusdpo_jax\[plan-gpu\]' and needs no GPU"):
        targets.devices("h100:8")


def test_every_gpu_has_a_description():
    for gpu in chips.GPUS.values():
        text = targets.target_config(gpu)
        assert f"device_memory_size: {gpu.memory}\n" in text and text.count("{") == text.count("}")
        major, minor = gpu.capability
        assert f"major: {major} minor: {minor}" in text


@needs_cuda
@pytest.mark.parametrize("name", list(chips.GPUS))
def test_gpu_devices_need_no_gpu(name):
    devices, chip = targets.devices(name)
    capability = ".".join(map(str, chips.GPUS[name].capability))
    assert [(d.platform, d.compute_capability) for d in devices] == [("gpu", capability)]
    assert 0 < chip.memory < chips.GPUS[name].memory
    assert {d.platform for d in jax.devices()} == {"cpu"}


@needs_cuda
def test_the_usable_memory_is_the_share_that_jax_allocates(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    _, chip = targets.devices("rtx4090")
    assert chip.memory == 0.9 * chips.GPUS["rtx4090"].memory and "90%" in chip.memory_note


@needs_cuda
def test_eight_gpus_are_a_machine():
    assert [d.process_index for d in targets.devices("h100:16")[0]] == [0] * 8 + [1] * 8
    assert [d.process_index for d in targets.devices("h100:8")[0]] == [0] * 8


@needs_cuda
def test_gpus_exchange_gradients():
    devices, _ = targets.devices("h100:8")
    mesh = Mesh(np.asarray(devices), ("data",))
    x = jax.ShapeDtypeStruct(
        (8, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    text = (
        jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        .lower(x)
        .compile()
        .as_text()
    )
    (found,) = collectives.read(text)
    assert (found.kind, found.size, found.group) == ("all-reduce", 4096, 8)


@needs_libtpu
@pytest.mark.parametrize(
    "name, count, hosts",
    [("v4:2x2x2", 8, 2), ("v5e:1x1", 1, 1), ("v5e:16x16", 256, 64), ("v6e:2x4", 8, 2)],
)
def test_slices_have_one_device_per_chip(name, count, hosts):
    devices, _ = targets.devices(name)
    assert len(devices) == count and len({d.process_index for d in devices}) == hosts
