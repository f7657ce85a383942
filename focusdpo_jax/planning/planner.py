"""Compiles a run's step ahead of time and reads off what it would need."""

import itertools
import math
import time

import jax
import ml_collections

from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import chips, shapes
from focusdpo_jax.sharding import collectives
from focusdpo_jax.sharding.mesh import AXES, make_mesh
from focusdpo_jax.training import operations
from focusdpo_jax.training.step import trace_step


def plan(config, topology, *, utilisation=0.4, structures=None):
    """What each chip would hold and do.

    Args:
      config: ConfigDict of a generator's objective, with `mesh`.
      topology: see `chips.devices`.
      utilisation: share of the data sheet's speed that is expected.
      structures: how many of the guides to compile; None all. The first is the least work.

    Returns:
      A JSON-serialisable dict: "fits", "bytes_per_chip" by kind with "limit" and "peak",
      "flops_per_pair", "collectives" ({program: {kind: {count, bytes}}}), "compile_seconds",
      "pairs_per_second", and what was planned ("topology", "mesh", "batch_size", "remat").
      Where the chip's memory is not known "fits" is None, and so is the speed.

    Raises:
      UserError: the topology, or the mesh on it, does not exist.
    """
    devices, chip = chips.devices(topology)
    mesh = make_mesh(config.mesh, config.batch_size, devices)
    step = shapes.abstract_step(config, mesh)
    guides, update = trace_step(step.task, step.optimizer, step.task.buckets, step.state,
                                step.batch, step.key, ema_decay=config.ema_decay)
    start = time.monotonic()
    traced = {"update": update()}
    traced |= {f"guide {s}": guide() for s, guide in itertools.islice(
        guides.items(), structures)}
    programs = {name: program.lower().compile() for name, program in traced.items()}
    seconds = time.monotonic() - start

    frozen = dict(step.task.frozen)
    held = {"frozen parameters": frozen["parameters"], "reference": frozen.get("reference", {}),
            "trained parameters": (step.state.trainable, step.state.average),
            "optimizer": step.state.optimizer, "batch": step.batch}
    memory = {name: _bytes_per_chip(tree) for name, tree in held.items()}
    memory["activations and temporaries"] = max(
        program.memory_analysis().temp_size_in_bytes for program in programs.values())
    memory["outputs"] = max(
        (m := program.memory_analysis()).output_size_in_bytes - m.alias_size_in_bytes
        for program in programs.values())
    peak, limit = sum(memory.values()), chip.memory

    work = {name: operations.count(program).products for name, program in traced.items()}
    guides_work = [flops for name, flops in work.items() if name != "update"]
    flops = (work["update"] + sum(guides_work) / max(len(guides_work), 1)) / config.batch_size
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
        "compile_seconds": seconds}


def search(config, topology, *, batches, splits=None, remats=(False, True), report, **options):
    """Plans every combination and returns all, the recommended one first.

    Recommended is what fits and promises most pairs a second; of equals the smallest batch.

    Args:
      batches: pairs a chip, each an int.
      splits: meshes to try; None takes all of data times fsdp.
      remats: values of config.model.remat.
      report: called with every plan, or with the UserError that refused one.

    Raises:
      UserError: nothing fits.
    """
    count = len(chips.devices(topology)[0])
    splits = splits or [{"data": count // n, "fsdp": n, "tensor": 1}
                        for n in range(1, count + 1) if count % n == 0]
    found = []
    for split, per_chip, remat in itertools.product(splits, batches, remats):
        tried = ml_collections.ConfigDict(config.to_dict())
        tried.mesh.update(split)
        tried.batch_size, tried.model.remat = per_chip * count, remat
        try:
            found.append(plan(tried, topology, **options))
        except (UserError, jax.errors.JaxRuntimeError) as error:
            # The compiler refuses what is far too large.
            report(error)
            continue
        report(found[-1])
    good = sorted((p for p in found if p["fits"]),
                  key=lambda p: (-p["pairs_per_second"], p["batch_size"]))
    if not good:
        raise UserError(f"--topology={topology}: nothing of what was tried fits; take more chips, a "
                        "smaller config.resolution or config.trainable = 'lora'")
    return good + [p for p in found if not p["fits"]]


def _bytes_per_chip(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(tree))


def table(found):
    """A plan as lines of text."""
    memory = found["bytes_per_chip"]
    lines = [f"{found['trainable']} at {found['resolution']} px on {found['chips']} x "
             f"{found['chip']}: mesh " + " x ".join(f"{a} {n}" for a, n in found["mesh"].items())
             + f", {found['batch_size']} pairs a step, remat {'on' if found['remat'] else 'off'}"]
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
    lines.append(f"  compiled in {found['compile_seconds']:.0f} s")
    return "\n".join(lines)
