"""Formats a plan as text."""

from collections.abc import Mapping
from typing import Any

from focusdpo_jax.planning import cures
from focusdpo_jax.sharding.mesh import AXES


def table(found: Mapping[str, Any]) -> str:
    """Formats the result of `planner.plan` as lines of text."""
    memory = found["bytes_per_chip"]
    mesh = " x ".join(f"{axis} {found['mesh'][axis]}" for axis in AXES)
    lines = [
        f"{found['trainable']} at {found['resolution']} px on {found['chips']} x {found['chip']}: "
        f"mesh {mesh}, {found['batch_size']} pairs per batch, remat {_on(found['remat'])}, "
        "encoders " + ("cached" if found["cache"] else "held")
    ]
    lines.append("  GB per chip during the program with the largest peak:")
    lines += [
        f"    {name:30s} {size / 1e9:9.3f}" for name, size in memory.items() if name != "limit"
    ]
    if memory["limit"]:
        note = f" ({found['limit_note']})" if found["limit_note"] else ""
        lines.append(
            f"    {'the chip has':30s} {memory['limit'] / 1e9:9.3f}{note}: it "
            + ("fits" if found["fits"] else "does NOT fit")
        )
    lines.append(
        f"  {'program':12s} {'of every':18s} {'rows a chip':>11s} {'held':>8s} "
        f"{'temporaries':>11s} {'peak GB':>8s}  {'':9s} {'s':>9s} {'links s':>9s}"
    )
    lines += [_program_row(name, made) for name, made in found["programs"].items()]
    if found["not_planned"]:
        lines.append(f"  not planned: {', '.join(found['not_planned'])}")
    lines += [
        f"  {cures.in_words(name, made, memory['limit'])}"
        for name, made in found["programs"].items()
        if made["fits"] is False
    ]
    lines += _speed(found)
    for program, kinds in found["collectives"].items():
        if found["chips"] > 1:
            lines.append(
                f"  {program}: "
                + (
                    ", ".join(
                        f"{k['count']} {kind} ({k['bytes'] / 1e6:.4g} MB)"
                        for kind, k in kinds.items()
                    )
                    or "no collectives"
                )
            )
    lines.append(
        f"  compiled in {found['compile_seconds']:.0f} s, with at most "
        f"{found['host_bytes'] / 1e9:.1f} GB of this machine's memory"
    )
    return "\n".join(lines)


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _gb(size: float | None) -> str:
    return f"{size / 1e9:.3f}" if size is not None else "?"


def _program_row(name: str, made: Mapping[str, Any]) -> str:
    estimate = made.get("estimate", {})
    seconds = estimate.get("seconds")
    if seconds is None and "roofline" in estimate:
        seconds = max(estimate["roofline"].values())
    verdict = {True: "fits", False: "NO", None: ""}[made["fits"]]
    bound = "~" if "roofline" in estimate else ""
    return (
        f"  {name:12s} {made['when'].removeprefix('of every '):18s} {made['rows_per_chip']:11d} "
        f"{_gb(made['held']):>8s} {_gb(made['temporaries']):>11s} "
        f"{_gb(made['peak']) if made['peak'] else '>' + _gb(made['needs_at_least'] or made['held']):>8s}"
        f"  {verdict:9s} {bound + _number(seconds):>9s} {_number(estimate.get('links')):>9s}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _speed(found: Mapping[str, Any]) -> list[str]:
    """Formats the lines about operations and time."""
    lines = [
        f"  {found['flops_per_pair'] / 1e12:.4g} TFLOP per pair"
        + (
            f", {found['model_flops_per_pair'] / 1e12:.4g} without recomputation by remat"
            if found["model_flops_per_pair"] != found["flops_per_pair"]
            else ""
        )
    ]
    if found["pairs_per_second"]:
        share = found["model_flops_utilisation"]
        lines.append(
            f"  ESTIMATE, not measured: {found['seconds_per_batch']:.3g} s per batch, "
            f"{found['pairs_per_second']:.3g} pairs/s"
            + (f", {share:.0%} of the chips' data sheet speed" if share else "")
            + f" ({found['speed_from']})"
        )
    for name, made in found["programs"].items():
        estimate = made.get("estimate", {})
        if estimate.get("kernels"):
            count = sum(estimate["kernels"].values())
            lines.append(
                f"  {name}: {count} fused kernels have no estimate; their products at the chip's "
                f"full speed, {estimate['kernel_seconds']:.3g} s, are added as a lower bound"
            )
        if estimate.get("nominal_copies"):
            lines.append(
                f"  {name}: {estimate['nominal_copies']} copies between layouts within fast "
                f"memory, {estimate['nominal_bytes'] / 1e9:.3g} GB, count almost nothing in the "
                "estimate; they take longer"
            )
        if estimate.get("unknown_loops"):
            lines.append(
                f"  {name}: {estimate['unknown_loops']} loops of unknown length count once"
            )
    if any("roofline" in made.get("estimate", {}) for made in found["programs"].values()):
        lines.append(
            "  ~ marks a roofline instead of an estimate: the larger of the time of the products "
            "at full speed and that of the bytes at full bandwidth without caches; the GPU "
            "compiler has no time estimates"
        )
    update = found["programs"].get("update", {}).get("estimate", {})
    if update.get("most_expensive"):
        lines.append(f"  the update's most expensive operations, of {update['seconds']:.3g} s:")
        lines += [
            f"    {each['share']:6.1%} {each['seconds'] * 1e3:9.3f} ms {each['count']:6d} x "
            f"{each['name']}"
            for each in update["most_expensive"]
        ]
    return lines


def refusal(found: Mapping[str, Any]) -> str | None:
    """Returns one line about the programs that do not fit and their cures; None if all fit."""
    failed = [
        cures.in_words(name, made, found["bytes_per_chip"]["limit"])
        for name, made in found["programs"].items()
        if made["fits"] is False
    ]
    return "; ".join(failed) or None
