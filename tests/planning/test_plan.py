"""Plans of the tiny run have the shapes, programs and operations of the run itself."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
import tiny
from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import compilation, planner, programs, report, search, timing
from focusdpo_jax.profiling import flops
from focusdpo_jax.profiling.chips import Chip
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import builders, shapes
from focusdpo_jax.training.state import create_state, make_optimizer
from focusdpo_jax.training.step import compile_step


def described(tree):
    """Shape, type and sharding of every leaf, by its path."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "trainable": "full",
            "dtype": "bfloat16",
            "ema_decay": 0.9,
            "accumulate": 2,
            "batch_size": 2,
        },
        {"optimizer": "muon", "accumulate": 2},
    ],
)
def test_shapes_are_those_of_the_run(tiny_config, tmp_path, overrides):
    config = tiny_config(**overrides)
    task = builders.make_task(config, epath.Path(tmp_path))
    state = create_state(task.trainable, make_optimizer(config), config.ema_decay)
    batch = task.prepare(next(task.batches))
    abstract = shapes.abstract_step(config, meshes.make_mesh(config.mesh.sizes, config.batch_size))
    assert described(abstract.state) == described(state)
    assert described(abstract.assembly.definition.frozen) == described(task.definition.frozen)
    assert described(abstract.batch) == described(batch)


@pytest.mark.parametrize("cache", [True, False])
def test_encoders_are_held_unless_encodings_are_cached(tiny_config, cache):
    config = tiny_config()
    config = tiny.changed(config, data__cache=cache)
    step = shapes.abstract_step(config, meshes.make_mesh(config.mesh.sizes, config.batch_size))
    assert set(step.encoders) == (
        set() if cache else {"vae", "image_encoder", "text_encoder", "text_encoder_2"}
    )


def test_a_resolution_between_latents_is_refused_before_anything_is_compiled(tiny_config):
    with pytest.raises(
        UserError,
        match="^config.resolution = 33: a latent of this model covers 4 pixels in "
        "each direction; give a positive multiple of 4, such as 32$",
    ):
        planner.plan(tiny_config(resolution=33), "local")


def test_a_plan_of_a_whole_run_adds_up(tiny_config):
    found = planner.plan(tiny_config(evaluation__scenes=4), "local")
    json.dumps(found)
    memory = found["bytes_per_chip"]
    kinds = [size for name, size in memory.items() if name not in ("peak", "limit")]
    assert memory["peak"] == sum(kinds) and min(kinds) >= 0
    # Adam keeps two moments of what is trained, and counters.
    assert 0 <= memory["optimizer"] - 2 * memory["trained parameters"] < 100
    assert found["fits"] is None and found["pairs_per_second"] is None
    assert found["flops_per_pair"] > 1e6 and found["compile_seconds"] > 0
    assert list(found["programs"]) == list(programs.NAMES) and not found["not_planned"]
    assert memory["peak"] == max(made["peak"] for made in found["programs"].values())
    # Encoders lie on the chips while something is drawn, and are cached while it trains.
    held = {name: made["held"] for name, made in found["programs"].items()}
    assert held["sampling"] > held["update"]
    text = report.table(found)
    assert "does NOT fit" not in text and report.refusal(found) is None
    assert all(f"\n  {name} " in text for name in programs.NAMES)


def test_programs_are_those_that_the_run_compiles(tiny_config, tmp_path):
    """Programs traced for a plan have the matrix products of the run's own programs."""
    config = tiny_config()
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    planned = {
        name: flops.count(program.trace()).matmul_flops
        for name, program in programs.run_programs(config, mesh)[0].items()
    }
    task = builders.make_task(config, epath.Path(tmp_path))
    state = create_state(task.trainable, make_optimizer(config), config.ema_decay)
    step = compile_step(task.definition, make_optimizer(config), state, task.example(), seed=0)
    assert planned["update"] + planned["reference pass"] == max(step.matmul_flops.values())


def test_a_run_that_fits_in_training_but_not_in_sampling_is_refused_with_a_cure(
    tiny_config, monkeypatch
):
    config = tiny_config(batch_size=1, evaluation__batch_size=64)
    roomy = planner.plan(config, "local", only=("update", "sampling"))
    peaks = {name: made["peak"] for name, made in roomy["programs"].items()}
    limit = (peaks["update"] + peaks["sampling"]) / 2
    assert peaks["update"] < limit < peaks["sampling"]
    small = Chip("small", limit, 1e12, 1e11)
    monkeypatch.setattr(planner.targets, "devices", lambda topology: (jax.devices(), small))
    found = planner.plan(config, "local", only=("update", "sampling"))
    assert found["programs"]["update"]["fits"] and not found["programs"]["sampling"]["fits"]
    assert found["fits"] is False
    cure = found["programs"]["sampling"]["cure"]
    (rows,) = cure["changes"].values()
    assert list(cure["changes"]) == ["evaluation.batch_size"] and rows < 64
    assert "sampling does not fit" in report.refusal(found)
    assert f"give config.evaluation.batch_size = {rows}" in report.refusal(found)
    assert cure["peak"] <= limit


def test_a_program_whose_arrays_exceed_the_memory_is_not_compiled(tiny_config, monkeypatch):
    """Also, a cure is searched for only once."""
    whole = planner.programs.run_programs(
        tiny_config(trainable="full"), meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 4)
    )[0]["update"].held
    small = Chip("small", compilation.bytes_per_chip(whole)["total"] - 1, 1e12, 1e11)
    monkeypatch.setattr(planner.targets, "devices", lambda topology: (jax.devices(), small))
    compiled = []
    monkeypatch.setattr(
        planner.cures,
        "find",
        lambda *arguments: (
            compiled.append(1)
            or {
                "changes": {"trainable": "lora", "model.lora_rank": 32},
                "peak": 1.0,
                "compiled": True,
            }
        ),
    )
    found = planner.plan(tiny_config(trainable="full"), "local")
    assert [made["refused"] for made in found["programs"].values()] == [compilation.HELD_ALONE] * 5
    # One cure, for what all have in common.
    assert len(compiled) == 1 and found["compile_seconds"] < 5
    assert report.refusal(found).count("config.trainable = 'lora'") == 5


def test_a_program_that_the_compiler_refuses_does_not_fit(tiny_config, monkeypatch):
    def refuse(*arguments, **options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(40.00G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    small = Chip("small", 15.75 * 2**30, 1e12)
    monkeypatch.setattr(planner.targets, "devices", lambda topology: (jax.devices(), small))
    found = planner.plan(tiny_config(), "local", only=("update",))
    made = found["programs"]["update"]
    assert (made["fits"], made["peak"], made["needs_at_least"]) == (False, None, 40 * 2**30)
    assert "it needs more than 42.9 GB of the chip's 16.9 GB" in report.table(found)


def test_a_search_recommends_the_plan_that_fits_with_least_communication(tiny_config, monkeypatch):
    def plan(config, topology, **options):
        size = config.batch_size * (1 if config.model.remat else 3) / config.mesh.fsdp
        told = {"all-gather": {"count": 1, "bytes": 100 * (1 + config.mesh.fsdp)}}
        return {
            "fits": size <= 8,
            "pairs_per_second": 3 if config.model.remat else 4,
            "batch_size": config.batch_size,
            "remat": config.model.remat,
            "fsdp": config.mesh.fsdp,
            "collectives": {"update": told},
        }

    def searched(batches, pairs=1000):
        seen = []
        config = tiny_config(data__train_size=pairs)
        plans = search.search(config, "v5e:2x2", batches=batches, report=seen.append)
        best = {name: plans[0][name] for name in ("batch_size", "remat", "fsdp")}
        return best, [(made["batch_size"], made["remat"], made["fsdp"]) for made in seen]

    monkeypatch.setattr(planner, "plan", plan)
    chip = Chip("chip", 16e9, 1e12)
    monkeypatch.setattr(planner.targets, "devices", lambda topology: ([None] * 4, chip))
    # 4 pairs fit in 4 and 2 parts, 8 pairs in 4; nothing is computed again in vain.
    assert searched([2, 1]) == (
        {"batch_size": 8, "remat": False, "fsdp": 4},
        [(4, False, 4), (4, False, 2), (4, False, 1), (8, False, 4), (8, False, 2)],
    )
    assert searched([8, 9]) == (
        {"batch_size": 32, "remat": True, "fsdp": 4},
        [(32, False, 4), (32, True, 4), (32, True, 2), (36, True, 4)],
    )
    with pytest.raises(UserError, match="--topology=v5e:2x2: nothing of what was tried fits"):
        searched([100])
    with pytest.raises(UserError, match="nothing of what was tried fits"):
        searched([1], pairs=2)  # `main` refuses a step of more pairs than there are.
    chip = dataclasses.replace(chip, flops=0.0)
    with pytest.raises(UserError, match="memory and speed of chip are not both known"):
        searched([1])


def test_all_programs_of_a_recommendation_are_planned_with_their_cures(tiny_config, monkeypatch):
    planned = []

    def plan(config, topology, **options):
        planned.append((config.batch_size, config.evaluation.batch_size))
        fits = config.evaluation.batch_size == 1
        cure = None if fits else {"changes": {"evaluation.batch_size": 1}}
        return {
            "fits": fits,
            "programs": {"update": {"fits": True}, "sampling": {"fits": fits, "cure": cure}},
        }

    monkeypatch.setattr(planner, "plan", plan)
    made = search.plan_recommended(tiny_config(), "v5e:2x2", {"batch_size": 8})
    assert made["fits"] and made["changes"] == {"batch_size": 8, "evaluation.batch_size": 1}
    assert planned == [(8, 2), (8, 1)]


def test_unless_held_raises_before_compilation(tiny_config, monkeypatch):
    small = Chip("small", 1000.0, 1.0)
    monkeypatch.setattr(planner.targets, "devices", lambda topology: (jax.devices(), small))
    with pytest.raises(
        UserError,
        match="mesh data 1 x fsdp 1 x tensor 1: parameters, optimiser "
        "and batch already take 0.0 GB of a chip's 0",
    ):
        planner.plan(tiny_config(), "local", unless_held=True)


def test_mistakes_are_one_line(tiny_folder):
    def run(*arguments):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "focusdpo_jax.plan",
                f"--config={tiny.ROOT / 'configs' / 'sdxl_dpo.py'}:debug",
                *arguments,
            ],
            capture_output=True,
            text=True,
            env=os.environ,
        )

    result = run("--topology=v9:4x4")
    assert result.returncode == 2
    assert (
        "error: --topology=v9:4x4: give a TPU slice, v4, v5e, v5p, v6e with its sh" in result.stderr
    )
    result = run("--programs=training")
    assert result.returncode == 2 and "'training' is none of update, sampling" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:2"])
def test_a_whole_run_is_planned_for_absent_machines(topology, tmp_path):
    """With the real compilers, which must be installed."""
    pytest.importorskip(
        "libtpu" if topology.startswith("v") else "jax_cuda12_plugin",
        reason="pip install -e '.[plan,plan-gpu]'",
    )
    config = tiny.tiny_config(tmp_path, model__pretrained="", dtype="bfloat16", trainable="full")
    found = planner.plan(config, topology)
    assert found["fits"] and not found["not_planned"]
    assert found["collectives"]["update"]["all-reduce"]["bytes"] > 0
    assert 0 < found["pairs_per_second"]
    update = found["programs"]["update"]["estimate"]
    if topology.startswith("v"):
        assert (
            update["unknown_loops"] == 0 and len(update["most_expensive"]) == timing.MOST_EXPENSIVE
        )
        assert sum(update["kinds"].values()) == update["cycles"]
    else:
        assert update["roofline"]["bytes"] > 0 and "the GPU compiler has no time estimates" in (
            report.table(found)
        )
