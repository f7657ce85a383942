"""A preference step at a time: seconds, share of the device, memory beside what was planned, and peers.

The step is built from shapes alone (`training.shapes`), as `plan` builds it; its parameters are drawn on
the device. At step 0 policy and reference have the same parameters and their difference should be zero,
but they are computed by two programs: what it is, is measured by the step itself.

diffusers' side is `step_diffusers.py` in a process of its own. Both sides have the same weights, noise
and conditioning, and step in turn.
"""

import copy
import dataclasses
import importlib.util
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from step import Side, most_resident, reset_resident
from step_inputs import PARTS, filled, write_conditioning, write_sizes

from focusdpo_jax.checkpoints import pytorch_names, tensor_file
from focusdpo_jax.models.generator import merge_parameters
from focusdpo_jax.profiling.peak_flops import matmul_peak
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import assembly, shapes
from focusdpo_jax.training import memory as device_memory
from focusdpo_jax.training.state import create_state
from focusdpo_jax.training.step import compile_beside

from . import cases, weights

# The strength that SDXL is trained with, for which a margin is also told.
_BETA = 5000.0
# Of a margin's parts, in a step's metrics.
_AT_START = (
    "margin",
    "winner_error_difference",
    "loser_error_difference",
    "reference_error",
    "error_map_difference",
    "loss",
    "gradient_norm",
)


class Ours:
    """Our step, compiled; it goes on from step to step.

    Attributes:
      compiled: `training.step.Step`.
      losses: of every step so far.
      metrics: what the last step measured, {name: float}.
    """

    def __init__(self, compiled, structure, params, state, frozen, pairs) -> None:
        self.compiled, self.losses, self.metrics = compiled, [], {}
        self._structure, self._params = structure, params
        self._state, self._frozen, self._pairs = state, frozen, pairs

    def step(self):
        """Seconds of the next step."""
        start = time.perf_counter()
        self._state, metrics = self.compiled(
            self._structure, self._state, self._frozen, self._pairs, self._params, len(self.losses)
        )
        self.metrics = metrics.compute()
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - start
        self.losses.append(self.metrics["loss"])
        return seconds


def measure(settings: Any, context: Any):
    """Yields a row of our step, and one for each peer."""
    config = cases.configuration(settings)
    mesh, device = cases.one_device(config), jax.devices()[0]
    peak = matmul_peak(device, config.dtype)
    plan = shapes.abstract_step(config, mesh)
    planned_step = plan.assembly.definition
    trainable = weights.draw(plan.assembly.trainable)
    frozen = {"parameters": weights.draw(planned_step.frozen["parameters"])}
    if "reference" in planned_step.frozen:
        frozen["reference"] = jax.jit(
            lambda tree: assembly.reference_parameters(tree, config.dtype, mesh),
            out_shardings=_shardings(planned_step.frozen["reference"]),
        )(trainable)
    definition = dataclasses.replace(planned_step, loss=watched(plan.assembly.step), frozen=frozen)
    on_host = filled(plan.batch, config, plan.assembly.generator.config.unet)
    pairs = meshes.shard_batch(on_host, mesh)
    structure, params = next(iter(definition.buckets.values()))
    row = {"key": "ours", "side": "focusdpo_jax", "matmul_peak": peak}
    peers, start = {}, time.monotonic()
    with compile_beside(
        definition, plan.optimizer, plan.state, pairs, seed=config.seed
    ) as compiling:
        if settings["peers"] and _have_peers():
            folder = pathlib.Path(context.scratch)
            parameters = merge_parameters(trainable, frozen["parameters"])
            _write(folder, settings, config, plan, parameters, on_host)
            _write_noisy(folder, settings, config, plan, pairs)
            del parameters
            peers = {
                how: Side(
                    "step_diffusers.py", "", folder, how, config.dtype, int(config.model.remat)
                )
                for how in settings["peers"]
            }
            for how, side in peers.items():
                if how != "eager":  # Compiles in its first step; the other would disturb.
                    for _ in range(settings["warmup"]):
                        side.send("step")
        state = jax.jit(
            lambda tree: create_state(tree, plan.optimizer, config.ema_decay),
            donate_argnums=0,
            out_shardings=_shardings(plan.state),
        )(trainable)
        del trainable
        compiled = compiling.result()
    row |= {
        "compile_seconds": time.monotonic() - start,
        "matmul_flops": compiled.matmul_flops[structure],
        "planned": planned(compiled, (frozen, state, pairs)),
    }
    room = device_memory.limit(device)
    if room and row["planned"]["peak"] > room:
        yield row | {"fits": False, "room": room}
        return
    ours = Ours(compiled, structure, params, state, frozen, pairs)
    del state
    ours.step()
    row["at_start"] = {name: ours.metrics[name] for name in _AT_START if name in ours.metrics}
    if "margin" in row["at_start"]:
        row["at_start"]["half_beta_margin"] = 0.5 * _BETA * row["at_start"]["margin"]
    for _ in range(settings["warmup"] - 1):
        ours.step()
    most_memory = _MostMemory(device)
    most_memory.reset()
    seconds = [ours.step() for _ in range(settings["rounds"])]
    yield (
        row
        | _spread(seconds)
        | {
            "fits": True,
            "memory": most_memory(),
            "losses": ours.losses,
            "pairs_per_second": config.batch_size / float(np.median(seconds)),
            "share_of_peak": row["matmul_flops"] / float(np.median(seconds)) / peak,
        }
    )
    if settings["peers"] and not peers:
        yield {"key": "peers", "side": "diffusers", "error": "not installed with torch"}
    for how, side in peers.items():
        yield _beside(ours, how, side, settings, asked=how != "eager")


def watched(objective):
    """The loss of a `GeneratorStep`, which also measures the largest difference of the error maps.

    Those of policy and reference, over all locations; `error_map_difference` among its metrics.
    """
    # Another object: the reference pass is traced at the same time, in another thread.
    watching, found = copy.copy(objective), []

    def remembered(*arguments, **options):
        result = objective._error(*arguments, **options)
        found.append(result[0])
        return result

    watching._error = remembered

    def loss(trainable, frozen, encoded, outputs, params, key):
        value, metrics = watching.loss(trainable, frozen, encoded, outputs, params, key)
        policy = jax.lax.stop_gradient(found.pop())
        if outputs.reference_error is None:
            return value, metrics
        difference = jnp.abs(policy - outputs.reference_error).max()
        return value, metrics | {"error_map_difference": difference}

    return loss


def planned(compiled, held):
    """Bytes that `plan` would tell, of the programs that were compiled here: by kind, and "peak"."""
    memory = [
        program.memory_analysis()
        for program in (*compiled.reference_passes.values(), compiled.update)
    ]
    kinds = {
        "held": device_memory.bytes_per_device(held),
        "temporaries": max(m.temp_size_in_bytes for m in memory),
        "outputs": max(m.output_size_in_bytes - m.alias_size_in_bytes for m in memory),
    }
    return kinds | {"peak": sum(kinds.values())}


class _MostMemory:
    """Bytes that there were at most: on the device, or on a CPU in the process."""

    def __init__(self, device) -> None:
        self._device = device if device.memory_stats() else None

    def reset(self):
        """Forgets what came before, where that is possible: a device's peak is its process's."""
        if self._device is None:
            reset_resident()

    def __call__(self):
        if self._device is None:
            return most_resident()
        return self._device.memory_stats()["peak_bytes_in_use"]


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _spread(seconds):
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"seconds": median, "quartiles": [low, high], "rounds": seconds}


def _have_peers():
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def _write(folder, settings, config, plan, parameters, on_host):
    """Weights and conditioning for the peers; weights are kept where they are this job's already."""
    write_sizes(folder, config, plan.assembly.generator.config)
    write_conditioning(folder, on_host)
    wanted, kind = json.dumps([settings["size"], settings["dtype"]]), folder / "weights.json"
    if kind.exists() and kind.read_text() == wanted:
        return
    kind.unlink(missing_ok=True)
    for part in PARTS:
        tensor_file.write(folder / f"{part}.safetensors", pytorch_names.from_flax(parameters[part]))
    kind.write_text(wanted)


def _write_noisy(folder, settings, config, plan, pairs):
    """What our step will draw, for each of the peers' steps."""
    noisy, key = (
        jax.jit(plan.assembly.step.noisy),
        meshes.random_key(config.seed, plan.assembly.definition.mesh),
    )
    _, params = next(iter(plan.assembly.definition.buckets.values()))
    for step in range(settings["warmup"] + settings["rounds"]):
        found = noisy(pairs, params, jax.random.fold_in(key, step))
        np.savez(folder / f"noisy_{step}.npz", **jax.device_get(found._asdict()))


def _beside(ours, how, side, settings, *, asked):
    """The row of a peer that steps in turn with us."""
    row = {"key": how, "side": f"diffusers, {how}"}
    try:
        if not asked:
            for _ in range(settings["warmup"]):
                side.send("step")
        losses = [side.receive()[1] for _ in range(settings["warmup"])]
        side.ask("reset")
        times = []
        for _ in range(settings["rounds"]):
            mine = ours.step()
            seconds, loss = side.ask("step")
            times.append((mine, seconds))
            losses.append(loss)
        memory = side.ask("memory")
    except (SystemExit, BrokenPipeError) as error:  # It has ended: its error is in the log.
        return row | {"error": str(error)}
    side.close()
    mine, theirs = np.transpose(times)
    ratios = np.percentile(theirs / mine, [50, 25, 75]).tolist()
    right = np.array(ours.losses[: len(losses)])
    return (
        row
        | _spread(theirs.tolist())
        | {
            "memory": memory,
            "ours_in_turn": float(np.median(mine)),
            "ratio": ratios[0],
            "ratio_quartiles": ratios[1:],
            "losses": losses,
            "losses_apart": float(np.max(np.abs(np.array(losses) - right) / np.abs(right))),
        }
    )
