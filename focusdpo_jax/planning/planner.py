"""Compiles a run's step ahead of time and reads off what it would need."""

import concurrent.futures
import itertools
import math
import resource
import time

import jax
import ml_collections

from focusdpo_jax import compiling
from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import chips, shapes
from focusdpo_jax.sharding import collectives
from focusdpo_jax.sharding.mesh import AXES, make_mesh
from focusdpo_jax.training import operations
from focusdpo_jax.training.step import trace_step


def plan(config, topology, *, utilisation=0.4, structures=None, unless_held=False):
    """What each chip would hold and do.

    Args:
      config: ConfigDict of a generator's objective, with `mesh`.
      topology: see `chips.devices`.
      utilisation: share of the data sheet's speed that is expected.
      structures: how many of the guides to compile; None all. The update needs more memory than any.
      unless_held: do not compile what has no room for its parameters and optimiser already.

    Returns:
      A JSON-serialisable dict: "fits", "bytes_per_chip" by kind with "limit" and "peak",
      "flops_per_pair", "collectives" ({program: {kind: {count, bytes}}}), "compile_seconds",
      "host_bytes" (this process's peak so far), "pairs_per_second", and what was planned
      ("topology", "mesh", "batch_size", "remat").
      Where the chip's memory is not known "fits" is None, and so is the speed.

    Raises:
      UserError: the topology, or the mesh on it, does not exist; or what is held leaves no room.
    """
    devices, chip = chips.devices(topology)
    mesh = make_mesh(config.mesh, config.batch_size, devices)
    step = shapes.abstract_step(config, mesh)
    frozen = dict(step.task.frozen)
    held = {"frozen parameters": frozen["parameters"], "encoders": step.encoders,
            "reference": frozen.get("reference", {}),
            "trained parameters": (step.state.trainable, step.state.average),
            "optimizer": step.state.optimizer, "batch": step.batch}
    memory = {name: _bytes_per_chip(tree) for name, tree in held.items()}
    if unless_held and chip.memory and sum(memory.values()) > chip.memory:
        raise UserError(
            f"{_split(mesh)}: parameters, optimiser and batch alone take "
            f"{sum(memory.values()) / 1e9:.1f} GB of a chip's {chip.memory / 1e9:.0f}")
    guides, update = trace_step(step.task, step.optimizer, step.task.buckets, step.state,
                                step.batch, step.key, ema_decay=config.ema_decay)
    start = time.monotonic()
    traced = {"update": update()} | {f"guide {s}": guide() for s, guide in guides.items()}
    compiled = list(traced)[:None if structures is None else 1 + structures]
    options = compiling.networks_on(mesh.devices.flat[0].platform)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(compiled, pool.map(
            lambda name: traced[name].lower().compile(options), compiled), strict=True))
    seconds = time.monotonic() - start

    memory["activations and temporaries"] = max(
        program.memory_analysis().temp_size_in_bytes for program in programs.values())
    memory["outputs"] = max(
        (m := program.memory_analysis()).output_size_in_bytes - m.alias_size_in_bytes
        for program in programs.values())
    peak, limit = sum(memory.values()), chip.memory

    work = {name: operations.count(program).products for name, program in traced.items()}
    guides_work = [flops for name, flops in work.items() if name != "update"]
    flops = (work["update"] + sum(guides_work) / len(guides_work)) / config.batch_size
    per_chip = flops * config.batch_size / mesh.size
    rate = config.batch_size / (per_chip / (utilisation * chip.flops)) if chip.flops else None
    return {
        "topology": topology, "chip": chip.name, "chips": mesh.size,
        "mesh": {axis: mesh.shape[axis] for axis in AXES}, "batch_size": config.batch_size,
        "trainable": config.trainable, "resolution": config.resolution,
        "remat": config.model.remat,
        "fits": bool(peak <= limit) if limit else None,
        "bytes_per_chip": {**memory, "peak": peak, "limit": limit or None},
        "flops_per_pair": flops, "utilisation": utilisation, "pairs_per_second": rate,
        "collectives": {name: collectives.summary(collectives.read(program.as_text()))
                        for name, program in programs.items()},
        "compile_seconds": seconds,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def search(config, topology, *, batches, splits=None, remats=(False, True), report, **options):
    """Plans what may be best and returns all plans that were made, the recommended one first.

    Memory grows with the batch and shrinks where parameters are divided more or activations are
    computed again. So every batch, from the smallest on, is tried with the most divided parameters
    first: if that does not fit, neither does a larger batch; if it does, fewer parts are tried, until
    they no longer fit. With remat only where nothing fits without. Recommended is, of what fits, what
    promises most pairs a second, and of equals what tells other chips least for a pair.

    Args:
      batches: pairs a chip, each an int.
      splits: meshes to try; None takes all of data times fsdp.
      remats: values of config.model.remat, the faster first.
      report: called with every plan, or with a UserError or the compiler's error in its place.

    Raises:
      UserError: nothing fits.
    """
    count = len(chips.devices(topology)[0])
    splits = splits or [{"data": count // n, "fsdp": n, "tensor": 1}
                        for n in range(1, count + 1) if count % n == 0]
    splits = sorted(splits, key=lambda split: -split["fsdp"] * split["tensor"])
    found = []

    def fits(split, per_chip, remat):
        tried = ml_collections.ConfigDict(config.to_dict())
        tried.mesh.update(split)
        tried.batch_size, tried.model.remat = per_chip * count, remat
        try:
            made = plan(tried, topology, unless_held=True, **options)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            # The compiler refuses what is far too large.
            report(error)
            return False
        report(made)
        found.append(made)
        return made["fits"]

    for remat in remats:
        for per_chip in sorted(batches):
            fitting = list(itertools.takewhile(
                lambda split, size=per_chip, remat=remat: fits(split, size, remat), splits))
            if not fitting:
                break
        if any(made["fits"] for made in found):
            break
    good = sorted((made for made in found if made["fits"]),
                  key=lambda made: (-made["pairs_per_second"], _told(made)))
    if not good:
        raise UserError(f"--topology={topology}: nothing of what was tried fits; take more chips, a "
                        "smaller config.resolution or config.trainable = 'lora'")
    return good + [made for made in found if not made["fits"]]


def _told(made):
    """Bytes that a chip gets from others for each pair."""
    return sum(kind["bytes"] for kinds in made["collectives"].values()
               for kind in kinds.values()) / made["batch_size"]


def _split(mesh):
    """A mesh (or its {axis: size}) in words."""
    sizes = getattr(mesh, "shape", mesh)
    return "mesh " + " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)


def _bytes_per_chip(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(tree))


def table(found):
    """A plan as lines of text."""
    memory = found["bytes_per_chip"]
    lines = [f"{found['trainable']} at {found['resolution']} px on {found['chips']} x "
             f"{found['chip']}: {_split(found['mesh'])}, {found['batch_size']} pairs a step, "
             f"remat {'on' if found['remat'] else 'off'}"]
    lines += [f"  {name:30s} {size / 1e9:9.3f} GB" for name, size in memory.items()
              if name != "limit"]
    if memory["limit"]:
        lines.append(f"  {'the chip has':30s} {memory['limit'] / 1e9:9.3f} GB: it "
                     + ("fits" if found["fits"] else "does NOT fit"))
    lines.append(f"  {found['flops_per_pair'] / 1e12:.4g} TFLOP a pair"
                 + (f", {found['pairs_per_second']:.3g} pairs/s at {found['utilisation']:.0%} of "
                    "the chip's speed" if found["pairs_per_second"] else ""))
    for program, kinds in found["collectives"].items():
        lines.append(f"  {program}: " + (", ".join(
            f"{k['count']} {kind} ({k['bytes'] / 1e6:.4g} MB)" for kind, k in kinds.items())
            or "no collectives"))
    lines.append(f"  compiled in {found['compile_seconds']:.0f} s, with at most "
                 f"{found['host_bytes'] / 1e9:.1f} GB of this machine's memory")
    return "\n".join(lines)
