"""Estimates the time of a compiled program on a chip, and the speed of a run."""

from collections.abc import Mapping
from typing import Any

from focusdpo_jax.config import RunConfig
from focusdpo_jax.profiling import collectives, estimates, flops, hlo
from focusdpo_jax.profiling.chips import Chip

# Programs that run for every batch.
_OF_A_BATCH = ("encoding", "reference pass", "update")
MOST_EXPENSIVE = 10
"""Number of entries in "most_expensive"."""


def estimate(chip: Chip, devices: int, text: hlo.Program, work: flops.Operations) -> dict[str, Any]:
    """Estimates the time of a program on one chip.

    Args:
      chip: the `Chip` that it was compiled for.
      devices: number of chips.
      text: the compiled program.
      work: operations of the traced program, on all chips.

    Returns:
      "matmul_flops" (of one chip), "bytes" (received from other chips), "links" (seconds for these
      bytes). For TPUs also "seconds" (the compiler's estimate without transfers, plus
      "kernel_seconds"), "cycles", "kinds", "kernels", "kernel_seconds", "nominal_copies",
      "nominal_bytes" (see `estimates.Estimate`), "unknown_loops" and "most_expensive". For GPUs
      also "bytes_accessed" and "roofline" (see `estimates.roofline`).
    """
    received = collectives.received(collectives.read(text), devices)
    speed = chip.network if devices > chip.per_host and chip.network else chip.link
    found: dict[str, Any] = {
        "matmul_flops": work.matmul_flops / devices,
        "bytes": received,
        "links": received / speed if speed else None,
    }
    if chip.clock:
        cost = estimates.read(text)
        kernels = work.kernels / devices
        return found | {
            "seconds": estimates.seconds(cost, chip, kernels),
            "cycles": cost.cycles,
            "kinds": cost.kinds,
            "kernels": cost.kernels,
            "kernel_seconds": kernels / chip.flops,
            "nominal_copies": cost.nominal_copies,
            "nominal_bytes": cost.nominal_bytes,
            "unknown_loops": cost.unknown_loops,
            "most_expensive": [
                {
                    "name": name,
                    "seconds": cycles / chip.clock,
                    "share": cycles / cost.cycles,
                    "count": count,
                }
                for name, cycles, count in cost.sources[:MOST_EXPENSIVE]
            ],
        }
    if chip.bandwidth:
        accessed = text.bytes_accessed
        return found | {
            "bytes_accessed": accessed,
            "roofline": estimates.roofline(chip, work.matmul_flops / devices, accessed),
        }
    return found


def speed(
    config: RunConfig,
    chip: Chip,
    devices: int,
    found: Mapping[str, Mapping[str, Any]],
    update_work: float,
    reference_flops: float,
    model_flops: float,
    flops_per_pair: float,
    utilisation: float,
) -> dict[str, Any]:
    """Computes the seconds per batch and the resulting speed.

    Args:
      config: the `RunConfig`.
      chip: the `Chip`.
      devices: number of chips.
      found: "programs" of `planner.plan`.
      update_work, reference_flops: operations of matrix products per batch in the update and in the
        reference pass.
      model_flops, flops_per_pair: the same per pair in both, without and with recomputation.
      utilisation: see `planner.plan`.

    Returns:
      "seconds_per_batch", "seconds_links" (the transfers in it), "pairs_per_second",
      "model_flops_utilisation" and "speed_from" of `planner.plan`; None if unknown.
    """
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
