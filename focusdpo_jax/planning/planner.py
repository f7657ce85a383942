"""Compiles a run's programs ahead of time and reads off what they would need."""

import itertools
import math
import re
import resource
import time

import jax
from absl import logging

from focusdpo_jax import config as config_lib
from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import chips, cures, programs
from focusdpo_jax.planning.memory import bytes_per_device
from focusdpo_jax.profiling import collectives, estimates, flops, hlo
from focusdpo_jax.sharding.mesh import AXES, make_mesh

_USED = re.compile(r"[Uu]sed ([\d.]+)([KMG])|required[^(]*\(([\d.]+)([KMG])\)")
_HELD_ALONE = "what is held alone has no room"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# Programs of which a batch's time is made.
_OF_A_BATCH = ("encoding", "reference pass", "update")
# What a checkpoint keeps.
_SAVED = ("trained parameters", "optimizer")
MOST_EXPENSIVE = 10


def plan(config, topology, *, utilisation=0.4, only=None, unless_held=False, cure=True):
    """What each chip would hold and do.

    Args:
      config: of a generator's objective.
      topology: see `chips.devices`.
      utilisation: share of the data sheet's speed that is expected where no compiler estimates time.
      only: names of `programs.NAMES` to compile; None all that the run has.
      unless_held: do not compile what has no room for its parameters and optimiser already.
      cure: look for a field that makes fit what does not.

    Returns:
      A JSON-serialisable dict:
        "fits": whether all programs do; None where the chip's memory is not known.
        "bytes_per_chip": by kind, with "peak" and "limit", while the fullest program runs.
        "programs": {name: "peak", "fits", "held", "temporaries", "outputs", "rows_per_chip", "when",
          "estimate" (see `_estimate`), "cure" ({field: value} or None) where it does not fit}.
        "flops_per_pair": products of the reference pass and the update; "model_flops_per_pair": the
          same without what remat computes again.
        "collectives": {program: {kind: {count, bytes}}}.
        "compile_seconds", "host_bytes" (this process's peak so far).
        "seconds_per_batch", "pairs_per_second", "model_flops_utilisation" and "speed_from", which says
          where these come from; None where nothing is known.
        "topology", "chip", "chips", "mesh", "batch_size", "trainable", "resolution", "remat", "cache", and
          what `campaign.cost` takes: "accumulate", "checkpoint_every", "chips_per_host", "record_bytes",
          "checkpoint_bytes" and "checkpoint_bytes_per_chip".

    Raises:
      UserError: the topology, or the mesh on it, does not exist; or what is held leaves no room.
    """
    devices, chip = chips.devices(topology)
    mesh = make_mesh(config.mesh.sizes, config.batch_size, devices)
    of_run, passes = programs.run_programs(config, mesh)
    held = {name: _bytes_per_chip(program.held) for name, program in of_run.items()}
    if unless_held and chip.memory and held["update"]["total"] > chip.memory:
        raise UserError(
            f"{_split(mesh)}: parameters, optimiser and batch alone take "
            f"{held['update']['total'] / 1e9:.1f} GB of a chip's {chip.memory / 1e9:.0f}"
        )
    start, found, texts, work = time.monotonic(), {}, {}, {}
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
    # All programs of a run are loaded, if not running.
    code = sum(made.pop("code") for made in found.values())
    for made in found.values():
        if made["peak"]:
            made["peak"] += code
            made["fits"] = bool(made["peak"] <= chip.memory) if chip.memory else None
    verdicts = [made["fits"] for made in found.values()]
    fits = None if None in verdicts else all(verdicts)

    if not work.get("update"):
        work["update"] = flops.count(of_run["update"].trace())
    passes_flops = [flops.count(trace()).matmul_flops for trace in passes]
    reference_flops = sum(passes_flops) / len(passes_flops)
    model_update = work["update"].matmul_flops
    if config.model.remat:
        plain = config_lib.replace(config, {"model.remat": False})
        model_update = flops.count(
            programs.run_programs(plain, mesh)[0]["update"].trace()
        ).matmul_flops
    flops_per_pair, model_flops = (
        (update + reference_flops) / config.batch_size
        for update in (work["update"].matmul_flops, model_update)
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
            work["update"].matmul_flops,
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
        _add_cures(config, topology, chip, result, of_run)
    return result


def _compiled(program, chip, devices):
    """Compiles a RunProgram: what `plan` says of it, its `hlo.Program` and its Operations."""
    held, start = _bytes_per_chip(program.held), time.monotonic()
    made = {
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
        # The compiler itself refuses what is larger than the chip.
        reason = " ".join(str(error).split())
        used = _USED.search(reason)
        used = used and float(used[1] or used[3]) * _UNITS[used[2] or used[4]]
        return (
            made
            | refused
            | {
                "needs_at_least": used,
                "refused": reason[:300],
                "compile_seconds": time.monotonic() - start,
            },
            None,
            work,
        )
    memory, text = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    made |= {
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        # Of the layouts in which the arguments lie.
        "padding": max(memory.argument_size_in_bytes - text.parameter_bytes, 0),
        "code": memory.generated_code_size_in_bytes,
    }
    made["peak"] = sum((held["total"], made["temporaries"], made["outputs"], made["padding"]))
    made["fits"] = bool(made["peak"] <= chip.memory) if chip.memory else None
    made["estimate"] = _estimate(chip, devices, text, work)
    made["compile_seconds"] = time.monotonic() - start
    return made, text, work


def _estimate(chip, devices, text, work):
    """What is known about a program's time on one chip.

    Returns:
      "products" (floating-point operations), "bytes" (that one chip gets from others), "links" (seconds
      that these take). For TPUs besides: "seconds" (the compiler's, transfers aside), "cycles", "kinds",
      "kernels" and "kernel_seconds" (what is added for them), "unknown_loops", "most_expensive". For GPUs:
      "roofline" (see `estimates.roofline`).
    """
    told = collectives.received(collectives.read(text), devices)
    speed = chip.network if devices > chip.per_host and chip.network else chip.link
    found = {
        "matmul_flops": work.matmul_flops / devices,
        "bytes": told,
        "links": told / speed if speed else None,
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
    config,
    chip,
    devices,
    found,
    update_work,
    reference_flops,
    model_flops,
    flops_per_pair,
    utilisation,
):
    """Seconds of a batch, and how fast that is."""
    nothing = {
        "seconds_per_batch": None,
        "pairs_per_second": None,
        "model_flops_utilisation": None,
        "seconds_links": None,
        "speed_from": None,
    }
    if not chip.flops:
        return nothing
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
            "the compiler's estimate, with transfers between chips as if nothing ran beside them"
        )
        if "reference pass" not in names:  # Of which nothing is known but its operations.
            share = 1 + reference_flops / update_work
            seconds, links = seconds * share, links * share
            source += "; the reference pass, not compiled, in proportion to its operations"
        if "encoding" not in names and not config.data.cache:
            source += "; without the encoding of every batch, which was not compiled"
        total = seconds + links
    else:
        total = flops_per_pair * config.batch_size / devices / (utilisation * chip.flops)
        return nothing | {
            "seconds_per_batch": total,
            "pairs_per_second": config.batch_size / total,
            "speed_from": f"{utilisation:.0%} of the chip's speed on paper, assumed",
        }
    return {
        "seconds_per_batch": total,
        "seconds_links": links,
        "pairs_per_second": config.batch_size / total,
        "model_flops_utilisation": model_flops * config.batch_size / devices / total / chip.flops,
        "speed_from": source,
    }


def _fullest(found, held, code, chip):
    """`bytes_per_chip` of a plan."""
    name = max(found, key=lambda name: found[name]["peak"] or math.inf)
    made = found[name]
    kinds = {kind: size for kind, size in held[name].items() if kind != "total"}
    kinds |= {
        "activations and temporaries": made["temporaries"] or 0,
        "outputs": made["outputs"] or 0,
        "padding": made["padding"] or 0,
        "programs": code,
    }
    peak = made["peak"] if made["peak"] else max(sum(kinds.values()), made["needs_at_least"] or 0)
    return {**kinds, "peak": peak, "limit": chip.memory or None}


def _add_cures(config, topology, chip, result, of_run):
    """Finds for each program that does not fit what would make it fit, and says so in `result`."""
    devices = chips.devices(topology)[0]

    def try_out(name, changes):
        """(held bytes, function that compiles and returns the peak or None) of a changed run."""
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

    before = []
    for name, made in result["programs"].items():
        if made["fits"] is not False:
            continue
        if made.get("refused") == _HELD_ALONE and before:
            made["cure"] = before[0]  # Nothing is known of this one but what it has in common.
            continue
        options = [
            *(cure["changes"] for cure in before),
            *cures.candidates(config, name, result["chips"]),
        ]
        made["cure"] = cures.find(
            options, made, chip.memory, lambda changes, name=name: try_out(name, changes)
        )
        before += [made["cure"]] if made["cure"] else []


def search(config, topology, *, batches, splits=None, remats=(False, True), report, **options):
    """Plans what may be best and returns all plans that were made, the recommended one first.

    Memory grows with the batch and shrinks where parameters are divided more or activations are
    computed again. So every batch, from the smallest on, is tried with the most divided parameters
    first: if that does not fit, neither does a larger batch; if it does, fewer parts are tried, until
    they no longer fit. Where nothing fits, the next lever is taken: remat, then encoders that are not
    held (config.data.cache), then no sum of gradients beside the optimiser (config.accumulate = 1).
    Recommended is, of what fits, what promises most pairs a second, and of equals what chips exchange
    least for a pair.

    Args:
      batches: pairs a chip, each an int.
      splits: meshes to try; None takes all of data times fsdp.
      remats: values of config.model.remat, the faster first.
      report: called with every plan, or with a UserError or the compiler's error in its place.

    Raises:
      UserError: nothing fits.
    """
    count = len(chips.devices(topology)[0])
    splits = splits or [
        {"data": count // n, "fsdp": n, "tensor": 1} for n in range(1, count + 1) if count % n == 0
    ]
    splits = sorted(splits, key=lambda split: -split["fsdp"] * split["tensor"])
    found = []

    def fits(split, per_chip, levers):
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
            # The compiler refuses what is far too large.
            report(error)
            return False
        made["changes"] = changes
        report(made)
        found.append(made)
        return made["fits"]

    for levers in _levers(config, remats):
        for per_chip in sorted(batches):
            fitting = list(
                itertools.takewhile(
                    lambda split, size=per_chip, levers=levers: fits(split, size, levers), splits
                )
            )
            if not fitting:
                break
        if any(made["fits"] for made in found):
            break
    good = sorted(
        (made for made in found if made["fits"]),
        key=lambda made: (-made["pairs_per_second"], _exchanged(made)),
    )
    if not good:
        raise UserError(
            f"--topology={topology}: nothing of what was tried fits; take more chips, a "
            "smaller config.resolution or config.trainable = 'lora'"
        )
    return good + [made for made in found if not made["fits"]]


def plan_recommended(config, topology, changes, **options):
    """The plan of all programs of a run with the changes that `search` recommends.

    Where a program does not fit, what makes it fit is added to the changes. They are in "changes".
    """
    made = plan(config_lib.replace(config, changes), topology, **options)
    cured = [
        program["cure"]["changes"] for program in made["programs"].values() if program.get("cure")
    ]
    if cured:
        for more in cured:
            changes = changes | more
        made = plan(config_lib.replace(config, changes), topology, **options)
    return made | {"changes": changes}


def _levers(config, remats):
    """Changes that `search` tries one after the other, each with those before it."""
    levers = [{"model.remat": remat} for remat in remats]
    if not config.data.cache:
        levers.append(levers[-1] | {"data.cache": True})
    if config.accumulate > 1:
        levers.append(levers[-1] | {"accumulate": 1})
    return levers


def _exchanged(made):
    """Bytes of collectives for each pair."""
    return (
        sum(kind["bytes"] for kinds in made["collectives"].values() for kind in kinds.values())
        / made["batch_size"]
    )


def _split(mesh):
    """A mesh (or its {axis: size}) in words."""
    sizes = getattr(mesh, "shape", mesh)
    return "mesh " + " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _record_bytes(config, of_run):
    """What is read of the data for a pair: its encoding, or its images, not compressed."""
    if config.data.cache:
        return _bytes(of_run["update"].held["batch"][0]) / config.batch_size
    return _bytes(of_run["encoding"].held["inputs"]) / of_run["encoding"].rows


def _bytes_per_chip(held):
    """{kind: bytes} of {kind: tree of shapes with shardings}, and their "total"."""
    sizes = {kind: bytes_per_device(tree) for kind, tree in held.items()}
    return sizes | {"total": sum(sizes.values())}
