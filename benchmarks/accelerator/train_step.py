"""Measures a preference step: seconds, fraction of peak, planned and actual memory, and peers.

The step is built from shapes (`training.shapes`) like that of `plan`, with random parameters on the
device. At step 0 policy and reference have equal parameters, so their difference should be zero.
They are computed by two programs, so the step measures the actual difference.

diffusers' side is `step_diffusers.py` in a separate process. Both sides have the same weights,
noise and conditioning, and step alternately.
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
from step import Side, peak_memory, reset_peak_memory
from step_inputs import PARTS, random_pairs, write_conditioning, write_sizes

from focusdpo_jax.checkpoints import pytorch_names, tensor_file
from focusdpo_jax.models.generator import merge_parameters
from focusdpo_jax.profiling.peak_flops import matmul_peak
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import assembly, shapes
from focusdpo_jax.training import memory as device_memory
from focusdpo_jax.training.state import create_state
from focusdpo_jax.training.step import compile_beside

from . import cases, weights

# Beta of SDXL's training, for which the margin is also reported.
_BETA = 5000.0
# Metrics of the first step that are recorded.
_AT_START = (
    "margin",
    "winner_error_difference",
    "loser_error_difference",
    "reference_error",
    "error_map_difference",
    "loss",
    "gradient_norm",
)


class OurStep:
    """Our compiled step with its state.

    Attributes:
      compiled: `training.step.Step`.
      losses: loss of every step so far.
      metrics: metrics of the last step, {name: float}.
    """

    def __init__(self, compiled, structure, params, state, frozen, pairs) -> None:
        self.compiled, self.losses, self.metrics = compiled, [], {}
        self._structure, self._params = structure, params
        self._state, self._frozen, self._pairs = state, frozen, pairs

    def step(self):
        """Runs the next step and returns its seconds."""
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
    """Yields a row for our step and one per peer."""
    config = cases.configuration(settings)
    mesh, device = cases.one_device(config), jax.devices()[0]
    matmul_peak_flops = matmul_peak(device, config.dtype)
    plan = shapes.abstract_step(config, mesh)
    planned_step = plan.assembly.definition
    trainable = weights.random_parameters(plan.assembly.trainable)
    frozen = {"parameters": weights.random_parameters(planned_step.frozen["parameters"])}
    if "reference" in planned_step.frozen:
        frozen["reference"] = jax.jit(
            lambda tree: assembly.reference_parameters(tree, config.dtype, mesh),
            out_shardings=_shardings(planned_step.frozen["reference"]),
        )(trainable)
    definition = dataclasses.replace(
        planned_step, loss=loss_with_error_map_difference(plan.assembly.step), frozen=frozen
    )
    host_pairs = random_pairs(plan.batch, config, plan.assembly.generator.config.unet)
    pairs = meshes.shard_batch(host_pairs, mesh)
    structure, params = next(iter(definition.buckets.values()))
    row = {"key": "ours", "side": "focusdpo_jax", "matmul_peak": matmul_peak_flops}
    peers, start = {}, time.monotonic()
    with compile_beside(
        definition, plan.optimizer, plan.state, pairs, seed=config.seed
    ) as compiling:
        if settings["peers"] and _peers_installed():
            folder = pathlib.Path(context.scratch)
            parameters = merge_parameters(trainable, frozen["parameters"])
            _write_inputs(folder, settings, config, plan, parameters, host_pairs)
            _write_noisy(folder, settings, config, plan, pairs)
            del parameters
            peers = {
                mode: Side(
                    "step_diffusers.py", "", folder, mode, config.dtype, int(config.model.remat)
                )
                for mode in settings["peers"]
            }
            for mode, side in peers.items():
                # Other peers compile in their first step, at the same time as ours. An eager
                # peer would only slow the compilation.
                if mode != "eager":
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
        "planned": planned_bytes(compiled, (frozen, state, pairs)),
    }
    limit = device_memory.limit(device)
    if limit and row["planned"]["peak"] > limit:
        yield row | {"fits": False, "room": limit}
        return
    ours = OurStep(compiled, structure, params, state, frozen, pairs)
    del state
    ours.step()
    row["at_start"] = {name: ours.metrics[name] for name in _AT_START if name in ours.metrics}
    if "margin" in row["at_start"]:
        row["at_start"]["half_beta_margin"] = 0.5 * _BETA * row["at_start"]["margin"]
    for _ in range(settings["warmup"] - 1):
        ours.step()
    peak_bytes = _PeakMemory(device)
    peak_bytes.reset()
    seconds = [ours.step() for _ in range(settings["rounds"])]
    yield (
        row
        | _quartiles(seconds)
        | {
            "fits": True,
            "memory": peak_bytes(),
            "losses": ours.losses,
            "pairs_per_second": config.batch_size / float(np.median(seconds)),
            "share_of_peak": row["matmul_flops"] / float(np.median(seconds)) / matmul_peak_flops,
        }
    )
    if settings["peers"] and not peers:
        yield {"key": "peers", "side": "diffusers", "error": "not installed with torch"}
    for mode, side in peers.items():
        yield _peer_row(ours, mode, side, settings, warmed_up=mode != "eager")


def loss_with_error_map_difference(objective):
    """The loss of a `GeneratorStep` with the additional metric `error_map_difference`.

    It is the largest absolute difference of the error maps of policy and reference.
    """
    # A copy, since the reference pass of `objective` is traced concurrently in another thread.
    recording, error_maps = copy.copy(objective), []

    def recorded_error(*arguments, **options):
        result = objective._error(*arguments, **options)
        error_maps.append(result[0])
        return result

    recording._error = recorded_error

    def loss(trainable, frozen, encoded, outputs, params, key):
        value, metrics = recording.loss(trainable, frozen, encoded, outputs, params, key)
        policy = jax.lax.stop_gradient(error_maps.pop())
        if outputs.reference_error is None:
            return value, metrics
        difference = jnp.abs(policy - outputs.reference_error).max()
        return value, metrics | {"error_map_difference": difference}

    return loss


def planned_bytes(compiled, held):
    """Memory of the compiled programs as in `plan`, {kind: bytes}, with their sum as "peak"."""
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


class _PeakMemory:
    """Peak memory in bytes: of the device, or on a CPU of the process."""

    def __init__(self, device) -> None:
        self._device = device if device.memory_stats() else None

    def reset(self):
        """Resets the peak on a CPU; the peak of a device cannot be reset."""
        if self._device is None:
            reset_peak_memory()

    def __call__(self):
        if self._device is None:
            return peak_memory()
        return self._device.memory_stats()["peak_bytes_in_use"]


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _quartiles(seconds):
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"seconds": median, "quartiles": [low, high], "rounds": seconds}


def _peers_installed():
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def _write_inputs(folder, settings, config, plan, parameters, host_pairs):
    """Writes weights (unless they exist) and conditioning for the peers."""
    write_sizes(folder, config, plan.assembly.generator.config)
    write_conditioning(folder, host_pairs)
    content, marker = json.dumps([settings["size"], settings["dtype"]]), folder / "weights.json"
    if marker.exists() and marker.read_text() == content:
        return
    marker.unlink(missing_ok=True)
    for part in PARTS:
        tensor_file.write(folder / f"{part}.safetensors", pytorch_names.from_flax(parameters[part]))
    marker.write_text(content)


def _write_noisy(folder, settings, config, plan, pairs):
    """Writes the noisy latents of our steps, which the peers read."""
    noisy, key = (
        jax.jit(plan.assembly.step.noisy),
        meshes.random_key(config.seed, plan.assembly.definition.mesh),
    )
    _, params = next(iter(plan.assembly.definition.buckets.values()))
    for step in range(settings["warmup"] + settings["rounds"]):
        batch = noisy(pairs, params, jax.random.fold_in(key, step))
        np.savez(folder / f"noisy_{step}.npz", **jax.device_get(batch._asdict()))


def _peer_row(ours, mode, side, settings, *, warmed_up):
    """Runs a peer alternately with our step and returns its row."""
    row = {"key": mode, "side": f"diffusers, {mode}"}
    try:
        if not warmed_up:
            for _ in range(settings["warmup"]):
                side.send("step")
        losses = [side.receive()[1] for _ in range(settings["warmup"])]
        side.request("reset")
        times = []
        for _ in range(settings["rounds"]):
            our_seconds = ours.step()
            seconds, loss = side.request("step")
            times.append((our_seconds, seconds))
            losses.append(loss)
        memory = side.request("memory")
    except (SystemExit, BrokenPipeError) as error:
        # The process has ended; its error is in the log.
        return row | {"error": str(error)}
    side.close()
    our_seconds, their_seconds = np.transpose(times)
    ratios = np.percentile(their_seconds / our_seconds, [50, 25, 75]).tolist()
    expected = np.array(ours.losses[: len(losses)])
    return (
        row
        | _quartiles(their_seconds.tolist())
        | {
            "memory": memory,
            "ours_in_turn": float(np.median(our_seconds)),
            "ratio": ratios[0],
            "ratio_quartiles": ratios[1:],
            "losses": losses,
            "losses_apart": float(np.max(np.abs(np.array(losses) - expected) / np.abs(expected))),
        }
    )
