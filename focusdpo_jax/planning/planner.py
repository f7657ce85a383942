"""Compiles a run's programs ahead of time and reports their memory, operations and time."""

import itertools
import math
import re
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from focusdpo_jax import config as config_lib
from focusdpo_jax.config import RunConfig
from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import chips, cures, programs
from focusdpo_jax.profiling import collectives, estimates, flops, hlo
from focusdpo_jax.sharding.mesh import AXES, make_mesh
from focusdpo_jax.training.memory import bytes_per_device

_USED = re.compile(r"[Uu]sed ([\d.]+)([KMG])|required[^(]*\(([\d.]+)([KMG])\)")
_HELD_ALONE = "the arrays held during the program already exceed the memory"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# Programs that run for every batch.
_OF_A_BATCH = ("encoding", "reference pass", "update")
# Kinds of arrays in a checkpoint.
_SAVED = ("trained parameters", "optimizer")
MOST_EXPENSIVE = 10


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
      topology: see `chips.devices`.
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
          "when", "estimate" (see `_estimate`), and, if it does not fit, "cure" ({field: value} or
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
      UserError: the topology, or the mesh on it, does not exist; or see `unless_held`.
    """
    devices, chip = chips.devices(topology)
    mesh = make_mesh(config.mesh.sizes, config.batch_size, devices)
    of_run, passes = programs.run_programs(config, mesh)
    held = {name: _bytes_per_chip(program.held) for name, program in of_run.items()}
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
            found[name], texts[name], work[name] = _compiled(program, chip, mesh.size)
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
        **_speed(
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


def _compiled(
    program: programs.RunProgram, chip: chips.Chip, devices: int
) -> tuple[dict[str, Any], hlo.Program | None, flops.Operations | None]:
    """Compiles a program.

    Returns:
      (its entry in the "programs" of `plan`, its text, its operations). The last two are None if it
      is not compiled because the held arrays do not fit; the text is None if the compiler refuses
      it.
    """
    held, start = _bytes_per_chip(program.held), time.monotonic()
    made: dict[str, Any] = {
        "when": program.when,
        "rows_per_chip": program.rows_per_chip,
        "field": f"config.{program.field}",
        "held": held["total"],
    }
    refused = {
        "temporaries": None,
        "outputs": None,
        "padding": None,
        "peak": None,
        "fits": False,
        "code": 0,
    }
    if chip.memory and held["total"] > chip.memory:
        return (
            made
            | refused
            | {"needs_at_least": held["total"], "refused": _HELD_ALONE, "compile_seconds": 0.0},
            None,
            None,
        )
    traced = program.trace()
    work = flops.count(traced)
    try:
        compiled = traced.lower().compile(dict(program.options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The compiler refuses programs that exceed the memory.
        reason = " ".join(str(error).split())
        used = _USED.search(reason)
        size = float(used[1] or used[3]) * _UNITS[used[2] or used[4]] if used else None
        return (
            made
            | refused
            | {
                "needs_at_least": size,
                "refused": reason[:300],
                "compile_seconds": time.monotonic() - start,
            },
            None,
            work,
        )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError(f"{program.name}: the compiler gives neither memory analysis nor text")
    text = hlo.Program(text)
    made |= {
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        # Padding due to the layouts of the arguments.
        "padding": max(memory.argument_size_in_bytes - text.parameter_bytes, 0),
        "code": memory.generated_code_size_in_bytes,
    }
    made["peak"] = held["total"] + made["temporaries"] + made["outputs"] + made["padding"]
    made["fits"] = bool(made["peak"] <= chip.memory) if chip.memory else None
    made["estimate"] = _estimate(chip, devices, text, work)
    made["compile_seconds"] = time.monotonic() - start
    return made, text, work


def _estimate(
    chip: chips.Chip, devices: int, text: hlo.Program, work: flops.Operations
) -> dict[str, Any]:
    """Estimates the time of a program on one chip.

    Returns:
      "matmul_flops" (of one chip), "bytes" (received from other chips), "links" (seconds for these
      bytes). For TPUs also "seconds" (the compiler's estimate without transfers, plus
      "kernel_seconds"), "cycles", "kinds", "kernels", "kernel_seconds", "unknown_loops" and
      "most_expensive". For GPUs also "bytes_accessed" and "roofline" (see `estimates.roofline`).
    """
    received = collectives.received(collectives.read(text), devices)
    speed = chip.network if devices > chip.per_host and chip.network else chip.link
    found: dict[str, Any] = {
        "matmul_flops": work.matmul_flops / devices,
        "bytes": received,
        "links": received / speed if speed else None,
    }
    if chip.clock:
        estimate = estimates.read(text)
        kernels = work.kernels / devices
        return found | {
            "seconds": estimates.seconds(estimate, chip, kernels),
            "cycles": estimate.cycles,
            "kinds": estimate.kinds,
            "kernels": estimate.kernels,
            "kernel_seconds": kernels / chip.flops,
            "unknown_loops": estimate.unknown_loops,
            "most_expensive": [
                {
                    "name": name,
                    "seconds": cycles / chip.clock,
                    "share": cycles / estimate.cycles,
                    "count": count,
                }
                for name, cycles, count in estimate.sources[:MOST_EXPENSIVE]
            ],
        }
    if chip.bandwidth:
        accessed = text.bytes_accessed
        return found | {
            "bytes_accessed": accessed,
            "roofline": estimates.roofline(chip, work.matmul_flops / devices, accessed),
        }
    return found


def _speed(
    config: RunConfig,
    chip: chips.Chip,
    devices: int,
    found: Mapping[str, Mapping[str, Any]],
    update_work: float,
    reference_flops: float,
    model_flops: float,
    flops_per_pair: float,
    utilisation: float,
) -> dict[str, Any]:
    """Returns the seconds per batch, the resulting speed, and the source of the estimate."""
    unknown: dict[str, Any] = {
        "seconds_per_batch": None,
        "pairs_per_second": None,
        "model_flops_utilisation": None,
        "seconds_links": None,
        "speed_from": None,
    }
    if not chip.flops:
        return unknown
    update = found.get("update", {}).get("estimate", {})
    if update.get("seconds"):
        names = [
            name
            for name in _OF_A_BATCH
            if found.get(name, {}).get("estimate") and found[name]["when"] == "of every batch"
        ]
        seconds = sum(found[name]["estimate"]["seconds"] for name in names)
        links = sum(found[name]["estimate"]["links"] or 0 for name in names)
        source = (
            "the compiler's estimate, with transfers between chips that do not overlap with "
            "computation"
        )
        if "reference pass" not in names:  # Only its operations are known.
            share = 1 + reference_flops / update_work
            seconds, links = seconds * share, links * share
            source += "; the reference pass, not compiled, in proportion to its operations"
        if "encoding" not in names and not config.data.cache:
            source += "; without the encoding of every batch, which was not compiled"
        total = seconds + links
    else:
        total = flops_per_pair * config.batch_size / devices / (utilisation * chip.flops)
        return unknown | {
            "seconds_per_batch": total,
            "pairs_per_second": config.batch_size / total,
            "speed_from": f"{utilisation:.0%} of the chip's data sheet speed, assumed",
        }
    return {
        "seconds_per_batch": total,
        "seconds_links": links,
        "pairs_per_second": config.batch_size / total,
        "model_flops_utilisation": model_flops * config.batch_size / devices / total / chip.flops,
        "speed_from": source,
    }


def _fullest(
    found: Mapping[str, Mapping[str, Any]],
    held: Mapping[str, Mapping[str, int]],
    code: int,
    chip: chips.Chip,
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


def _add_cures(config: RunConfig, topology: str, chip: chips.Chip, result: dict[str, Any]) -> None:
    """Finds changes that make the programs fit, and adds them to `result`."""
    devices = chips.devices(topology)[0]

    def try_out(name: str, changes: cures.Changes) -> tuple[float, int, Callable[[], float | None]]:
        """Returns (held bytes, rows per chip, function that compiles and returns the peak)."""
        tried = config_lib.replace(config, changes)
        config_lib.check(tried)
        mesh = make_mesh(tried.mesh.sizes, tried.batch_size, devices)
        program = programs.run_programs(tried, mesh)[0].get(name)
        if program is None:
            return 0, 0, lambda: 0
        return (
            _bytes_per_chip(program.held)["total"],
            program.rows_per_chip,
            lambda: _compiled(program, chip, mesh.size)[0]["peak"],
        )

    before: list[dict[str, Any]] = []
    for name, made in result["programs"].items():
        if made["fits"] is not False:
            continue
        if made.get("refused") == _HELD_ALONE and before:
            made["cure"] = before[0]  # This program was not compiled, so nothing else is known.
            continue
        options = [
            *(cure["changes"] for cure in before),
            *cures.candidates(config, name, result["chips"]),
        ]
        made["cure"] = cures.find(
            options, made, chip.memory, lambda changes, name=name: try_out(name, changes)
        )
        if made["cure"]:
            before.append(made["cure"])


def search(
    config: RunConfig,
    topology: str,
    *,
    batches: Iterable[int],
    splits: list[dict[str, int]] | None = None,
    remats: Sequence[bool] = (False, True),
    report: Callable[[dict[str, Any] | Exception], None],
    **options: Any,
) -> list[dict[str, Any]]:
    """Searches meshes and batch sizes; returns all plans that were made, the recommended one first.

    Memory grows with the batch, and shrinks with more shards of the parameters or with remat. So
    for every batch size, starting with the smallest, meshes are tried from the most to the fewest
    shards until one does not fit. If the first mesh does not fit, larger batches are not tried. If
    nothing fits, the next lever is used: remat, then cached encodings (config.data.cache), then no
    gradient accumulation (config.accumulate = 1). The recommended plan has the most pairs per
    second; among equals, the fewest bytes of collectives per pair.

    Args:
      config: the `RunConfig`.
      topology: see `chips.devices`.
      batches: numbers of pairs per chip to try.
      splits: meshes to try; None for all products of data and fsdp.
      remats: values of config.model.remat to try, the faster first.
      report: called with every plan, or with a UserError or the compiler's error instead.
      **options: further arguments of `plan`.

    Raises:
      UserError: nothing fits.
    """
    count = len(chips.devices(topology)[0])
    splits = splits or [
        {"data": count // n, "fsdp": n, "tensor": 1} for n in range(1, count + 1) if count % n == 0
    ]
    splits = sorted(splits, key=lambda split: -split["fsdp"] * split["tensor"])
    plans: list[dict[str, Any]] = []

    def fits(split: dict[str, int], per_chip: int, levers: dict[str, Any]) -> bool:
        changes = levers | {f"mesh.{axis}": size for axis, size in split.items()}
        changes["batch_size"] = per_chip * count
        try:
            made = plan(
                config_lib.replace(config, changes),
                topology,
                unless_held=True,
                cure=False,
                **options,
            )
        except (UserError, jax.errors.JaxRuntimeError) as error:
            # The compiler refuses programs that are far too large.
            report(error)
            return False
        made["changes"] = changes
        report(made)
        plans.append(made)
        return bool(made["fits"])

    for levers in _levers(config, remats):
        for per_chip in sorted(batches):
            fitting = list(
                itertools.takewhile(
                    lambda split, size=per_chip, levers=levers: fits(split, size, levers), splits
                )
            )
            if not fitting:
                break
        if any(made["fits"] for made in plans):
            break
    good = sorted(
        (made for made in plans if made["fits"]),
        key=lambda made: (-made["pairs_per_second"], _exchanged(made)),
    )
    if not good:
        raise UserError(
            f"--topology={topology}: nothing of what was tried fits; take more chips, a "
            "smaller config.resolution or config.trainable = 'lora'"
        )
    return good + [made for made in plans if not made["fits"]]


def plan_recommended(
    config: RunConfig, topology: str, changes: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Plans all programs of a run with the changes that `search` recommends.

    If a program does not fit, the fields that make it fit are added. "changes" in the result
    contains all changes.
    """
    made = plan(config_lib.replace(config, changes), topology, **options)
    cured = [
        program["cure"]["changes"] for program in made["programs"].values() if program.get("cure")
    ]
    if cured:
        for more in cured:
            changes = {**changes, **more}
        made = plan(config_lib.replace(config, changes), topology, **options)
    return made | {"changes": changes}


def _levers(config: RunConfig, remats: Iterable[bool]) -> list[dict[str, Any]]:
    """Returns the changes that `search` tries in turn, each including the previous ones."""
    levers: list[dict[str, Any]] = [{"model.remat": remat} for remat in remats]
    if not config.data.cache:
        levers.append(levers[-1] | {"data.cache": True})
    if config.accumulate > 1:
        levers.append(levers[-1] | {"accumulate": 1})
    return levers


def _exchanged(made: Mapping[str, Any]) -> float:
    """Returns the bytes of collectives per pair."""
    return (
        sum(kind["bytes"] for kinds in made["collectives"].values() for kind in kinds.values())
        / made["batch_size"]
    )


def _split(mesh: Mesh) -> str:
    return "mesh " + " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _record_bytes(config: RunConfig, of_run: Mapping[str, programs.RunProgram]) -> float:
    """Returns the bytes that are read per pair: its encoding, or its uncompressed images."""
    if config.data.cache:
        return _bytes(of_run["update"].held["batch"][0]) / config.batch_size
    return _bytes(of_run["encoding"].held["inputs"]) / of_run["encoding"].rows


def _bytes_per_chip(held: Mapping[str, Any]) -> dict[str, int]:
    """Returns {kind: bytes per chip} of {kind: tree of sharded shapes}, and their "total"."""
    sizes = {kind: bytes_per_device(tree) for kind, tree in held.items()}
    return sizes | {"total": sum(sizes.values())}
