"""Plans a run: the memory, operations and time of its programs on machines that may be absent."""

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from focusdpo_jax import config as config_lib
from focusdpo_jax.config import RunConfig
from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import compilation, cures, programs, targets, timing
from focusdpo_jax.profiling import collectives, flops, hlo
from focusdpo_jax.profiling.chips import Chip
from focusdpo_jax.sharding.mesh import AXES, make_mesh

# Kinds of arrays in a checkpoint.
_SAVED = ("trained parameters", "optimizer")


def plan(
    config: RunConfig,
    topology: str,
    *,
    utilisation: float = 0.4,
    only: Sequence[str] | None = None,
    unless_held: bool = False,
    cure: bool = True,
) -> dict[str, Any]:
    """Plans a run: computes the memory, operations and time of its programs on each chip.

    Args:
      config: a `RunConfig` with a generator's objective.
      topology: see `targets.devices`.
      utilisation: assumed share of the data sheet's speed, if the compiler does not estimate the
        time.
      only: names of `programs.NAMES` to compile; None for all programs of the run.
      unless_held: whether to raise an error instead of compiling if the arrays held during the
        update already exceed the memory.
      cure: whether to search for changes that make programs fit.

    Returns:
      A JSON-serialisable dict:
        "fits": whether all programs fit; None if the chip's memory is unknown.
        "bytes_per_chip": bytes by kind during the program with the largest peak, with "peak" and
          "limit".
        "programs": {name: {"peak", "fits", "held", "temporaries", "outputs", "rows_per_chip",
          "when", "estimate" (see `timing.estimate`), and, if it does not fit, "cure" ({field: value} or
          None)}}.
        "flops_per_pair": operations of matrix products in the reference pass and the update.
        "model_flops_per_pair": the same without recomputation by remat.
        "collectives": {program: {kind: {count, bytes}}}.
        "compile_seconds", "host_bytes": duration, and peak memory of this process so far.
        "seconds_per_batch", "pairs_per_second", "model_flops_utilisation", "speed_from": estimates
          and their source; None if unknown.
        "topology", "chip", "chips", "mesh", "batch_size", "trainable", "resolution", "remat",
          "cache": settings of the run.
        "accumulate", "checkpoint_every", "chips_per_host", "record_bytes", "checkpoint_bytes",
          "checkpoint_bytes_per_chip": inputs of `campaign.cost`.

    Raises:
      UserError: the topology, or the mesh on it, does not exist; `only` names a program that the
        run does not have; or see `unless_held`.
    """
    devices, chip = targets.devices(topology)
    mesh = make_mesh(config.mesh.sizes, config.batch_size, devices)
    of_run, passes = programs.run_programs(config, mesh)
    missing = [name for name in only or () if name not in of_run]
    if missing:
        raise UserError(
            f"--programs={','.join(only or ())}: this run has no program {missing[0]!r}; it has "
            f"{', '.join(of_run)}"
        )
    held = {name: compilation.bytes_per_chip(program.held) for name, program in of_run.items()}
    if unless_held and chip.memory and held["update"]["total"] > chip.memory:
        raise UserError(
            f"{_split(mesh)}: parameters, optimiser and batch already take "
            f"{held['update']['total'] / 1e9:.1f} GB of a chip's {chip.memory / 1e9:.0f}"
        )
    start = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    texts: dict[str, hlo.Program | None] = {}
    work: dict[str, flops.Operations | None] = {}
    for name, program in of_run.items():
        if only is None or name in only:
            found[name], texts[name], work[name] = compilation.compile_program(
                program, chip, mesh.size
            )
            logging.info(
                "%s: %s GB, compiled in %.0f s",
                name,
                "more than" if not found[name]["peak"] else f"{found[name]['peak'] / 1e9:.2f}",
                found[name]["compile_seconds"],
            )
    seconds = time.monotonic() - start
    # All programs of a run stay loaded on the chip, also those that are not running.
    code = sum(made.pop("code") for made in found.values())
    for made in found.values():
        if made["peak"]:
            made["peak"] += code
            made["fits"] = bool(made["peak"] <= chip.memory) if chip.memory else None
    verdicts = [made["fits"] for made in found.values()]
    fits = None if None in verdicts else all(verdicts)

    update_work = work.get("update") or flops.count(of_run["update"].trace())
    passes_flops = [flops.count(trace()).matmul_flops for trace in passes]
    reference_flops = sum(passes_flops) / len(passes_flops)
    model_update = update_work.matmul_flops
    if config.model.remat:
        plain = config_lib.replace(config, {"model.remat": False})
        model_update = flops.count(
            programs.run_programs(plain, mesh)[0]["update"].trace()
        ).matmul_flops
    flops_per_pair, model_flops = (
        (update + reference_flops) / config.batch_size
        for update in (update_work.matmul_flops, model_update)
    )
    result = {
        "topology": topology,
        "chip": chip.name,
        "chips": mesh.size,
        "mesh": {axis: mesh.shape[axis] for axis in AXES},
        "batch_size": config.batch_size,
        "trainable": config.trainable,
        "resolution": config.resolution,
        "remat": config.model.remat,
        "cache": config.data.cache,
        "accumulate": config.accumulate,
        "checkpoint_every": config.checkpoint_every,
        "chips_per_host": min(chip.per_host, mesh.size),
        "record_bytes": _record_bytes(config, of_run),
        "checkpoint_bytes": _bytes([of_run["update"].held[kind] for kind in _SAVED]),
        "checkpoint_bytes_per_chip": sum(held["update"][kind] for kind in _SAVED),
        "fits": fits,
        "bytes_per_chip": _fullest(found, held, code, chip),
        "limit_note": chip.memory_note,
        "programs": found,
        "not_planned": [name for name in of_run if name not in found],
        "flops_per_pair": flops_per_pair,
        "model_flops_per_pair": model_flops,
        **timing.speed(
            config,
            chip,
            mesh.size,
            found,
            update_work.matmul_flops,
            reference_flops,
            model_flops,
            flops_per_pair,
            utilisation,
        ),
        "collectives": {
            name: collectives.summary(collectives.read(text))
            for name, text in texts.items()
            if text
        },
        "compile_seconds": seconds,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if cure and fits is False:
        _add_cures(config, topology, chip, result)
    return result


def _fullest(
    found: Mapping[str, Mapping[str, Any]],
    held: Mapping[str, Mapping[str, int]],
    code: int,
    chip: Chip,
) -> dict[str, Any]:
    """Returns the "bytes_per_chip" of a plan."""
    name = max(found, key=lambda name: found[name]["peak"] or math.inf)
    made = found[name]
    kinds: dict[str, Any] = {kind: size for kind, size in held[name].items() if kind != "total"}
    kinds |= {
        "activations and temporaries": made["temporaries"] or 0,
        "outputs": made["outputs"] or 0,
        "padding": made["padding"] or 0,
        "programs": code,
    }
    peak = made["peak"] if made["peak"] else max(sum(kinds.values()), made["needs_at_least"] or 0)
    return {**kinds, "peak": peak, "limit": chip.memory or None}


def _add_cures(config: RunConfig, topology: str, chip: Chip, result: dict[str, Any]) -> None:
    """Finds changes that make the programs fit, and adds them to `result`."""
    devices = targets.devices(topology)[0]
    code = result["bytes_per_chip"]["programs"]

    def try_out(name: str, changes: cures.Changes) -> tuple[float, int, Callable[[], float | None]]:
        """Returns (held bytes, rows per chip, function that compiles and returns the peak)."""
        tried = config_lib.replace(config, changes)
        config_lib.check(tried)
        mesh = make_mesh(tried.mesh.sizes, tried.batch_size, devices)
        program = programs.run_programs(tried, mesh)[0].get(name)
        if program is None:
            return 0, 0, lambda: 0
        return (
            compilation.bytes_per_chip(program.held)["total"],
            program.rows_per_chip,
            lambda: compilation.compile_program(program, chip, mesh.size)[0]["peak"],
        )

    before: list[dict[str, Any]] = []
    for name, made in result["programs"].items():
        if made["fits"] is not False:
            continue
        if made.get("refused") == compilation.HELD_ALONE and before:
            made["cure"] = before[0]  # This program was not compiled, so nothing else is known.
            continue
        options = [
            *(cure["changes"] for cure in before),
            *cures.candidates(config, name, result["chips"]),
        ]
        made["cure"] = cures.find(
            options, made, chip.memory - code, lambda changes, name=name: try_out(name, changes)
        )
        if made["cure"]:
            if made["cure"]["peak"]:
                made["cure"]["peak"] += code
            before.append(made["cure"])


def _split(mesh: Mesh) -> str:
    return "mesh " + " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _record_bytes(config: RunConfig, of_run: Mapping[str, programs.RunProgram]) -> float:
    """Returns the bytes that are read per pair: its encoding, or its uncompressed images."""
    if config.data.cache:
        return _bytes(of_run["update"].held["batch"][0]) / config.batch_size
    return _bytes(of_run["encoding"].held["inputs"]) / of_run["encoding"].rows
