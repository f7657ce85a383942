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


def test_a_search_recommends_the_fastest_that_fits(tiny_config, monkeypatch):
    def plan(config, topology, **options):
        size = config.batch_size * (1 if config.model.remat else 3) / config.mesh.fsdp
        return {"fits": size <= 8, "pairs_per_second": config.batch_size / (
            1.3 if config.model.remat else 1), "batch_size": config.batch_size,
            "remat": config.model.remat, "fsdp": config.mesh.fsdp}

    monkeypatch.setattr(planner, "plan", plan)
    monkeypatch.setattr(planner.chips, "devices", lambda topology: ([None] * 4, None))
    seen = []
    plans = planner.search(tiny_config(), "v5e:2x2", batches=[1, 2], report=seen.append)
    assert len(seen) == len(plans) == 3 * 2 * 2
    assert plans[0] == {"fits": True, "pairs_per_second": 8, "batch_size": 8, "remat": False,
                        "fsdp": 4}
    with pytest.raises(UserError, match="--topology=v5e:2x2: nothing of what was tried fits"):
        planner.search(tiny_config(), "v5e:2x2", batches=[100], report=seen.append)


def test_mistakes_are_one_line(tiny_folder):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "focusdpo_jax.plan",
             f"--config={tiny.ROOT / 'configs' / 'sdxl_dpo.py'}:debug", *arguments],
            capture_output=True, text=True, env=os.environ)

    result = run("--topology=v9:4x4")
    assert result.returncode == 2
    assert "error: --topology=v9:4x4: give one of v4, v5e, v5p, v6e with its shape" in result.stderr
