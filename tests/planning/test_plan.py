"""A plan says of the tiny run what the run itself has."""

import json
import os
import subprocess
import sys

import jax
import pytest
import tiny
from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import planner, shapes
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import tasks
from focusdpo_jax.training.state import create_state, make_optimizer


def described(tree):
    """Shape, type and sharding of every leaf, by its path."""
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("overrides", [{}, {"trainable": "full", "dtype": "bfloat16",
                                            "ema_decay": 0.9, "accumulate": 2, "batch_size": 2}])
def test_shapes_are_those_of_the_run(tiny_config, tmp_path, overrides):
    config = tiny_config(**overrides)
    task = tasks.make_task(config, epath.Path(tmp_path))
    state = create_state(task.trainable, make_optimizer(config), config.ema_decay)
    batch = task.prepare(next(task.batches))
    abstract = shapes.abstract_step(config, meshes.make_mesh(config.mesh, config.batch_size))
    assert described(abstract.state) == described(state)
    assert described(abstract.task.frozen) == described(task.frozen)
    assert described(abstract.batch) == described(batch)


@pytest.mark.parametrize("cache", [True, False])
def test_encoders_are_held_unless_all_is_encoded_before(tiny_config, cache):
    config = tiny_config()
    config.data.cache = cache
    step = shapes.abstract_step(config, meshes.make_mesh(config.mesh, config.batch_size))
    assert set(step.encoders) == (set() if cache else {
        "vae", "image_encoder", "text_encoder", "text_encoder_2"})


def test_a_plan_adds_up(tiny_config):
    found = planner.plan(tiny_config(), "local")
    json.dumps(found)
    memory = found["bytes_per_chip"]
    kinds = [size for name, size in memory.items() if name not in ("peak", "limit")]
    assert memory["peak"] == sum(kinds) and min(kinds) >= 0
    # Adam keeps two moments of what is trained, and counters.
    assert 0 <= memory["optimizer"] - 2 * memory["trained parameters"] < 100
    assert found["fits"] is None and found["pairs_per_second"] is None
    assert found["flops_per_pair"] > 1e6 and found["compile_seconds"] > 0
    assert "does NOT fit" not in planner.table(found)


def test_a_search_recommends_what_fits_and_tells_least(tiny_config, monkeypatch):
    def plan(config, topology, **options):
        size = config.batch_size * (1 if config.model.remat else 3) / config.mesh.fsdp
        told = {"all-gather": {"count": 1, "bytes": 100 * (1 + config.mesh.fsdp)}}
        return {"fits": size <= 8, "pairs_per_second": 3 if config.model.remat else 4,
                "batch_size": config.batch_size, "remat": config.model.remat,
                "fsdp": config.mesh.fsdp, "collectives": {"update": told}}

    def searched(batches):
        seen = []
        plans = planner.search(tiny_config(), "v5e:2x2", batches=batches, report=seen.append)
        best = {name: plans[0][name] for name in ("batch_size", "remat", "fsdp")}
        return best, [(made["batch_size"], made["remat"], made["fsdp"]) for made in seen]

    monkeypatch.setattr(planner, "plan", plan)
    monkeypatch.setattr(planner.chips, "devices", lambda topology: ([None] * 4, None))
    # 4 pairs fit in 4 and 2 parts, 8 pairs in 4; nothing is computed again in vain.
    assert searched([2, 1]) == ({"batch_size": 8, "remat": False, "fsdp": 4},
                                [(4, False, 4), (4, False, 2), (4, False, 1),
                                 (8, False, 4), (8, False, 2)])
    assert searched([8, 9]) == ({"batch_size": 32, "remat": True, "fsdp": 4},
                                [(32, False, 4), (32, True, 4), (32, True, 2), (36, True, 4)])
    with pytest.raises(UserError, match="--topology=v5e:2x2: nothing of what was tried fits"):
        searched([100])


def test_no_compilation_where_there_is_no_room(tiny_config, monkeypatch):
    small = planner.chips.Chip("small", 1000.0, 1.0)
    monkeypatch.setattr(planner.chips, "devices", lambda topology: (jax.devices(), small))
    with pytest.raises(UserError, match="mesh data 1 x fsdp 1 x tensor 1: parameters, optimiser "
                                        "and batch alone take 0.0 GB of a chip's 0"):
        planner.plan(tiny_config(), "local", unless_held=True)


def test_mistakes_are_one_line(tiny_folder):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "focusdpo_jax.plan",
             f"--config={tiny.ROOT / 'configs' / 'sdxl_dpo.py'}:debug", *arguments],
            capture_output=True, text=True, env=os.environ)

    result = run("--topology=v9:4x4")
    assert result.returncode == 2
    assert "error: --topology=v9:4x4: give one of v4, v5e, v5p, v6e with its shape" in result.stderr
