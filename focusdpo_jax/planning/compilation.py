"""Compiles one program ahead of time, and reports its memory on a chip."""

import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from focusdpo_jax.planning import programs, timing
from focusdpo_jax.profiling import flops, hlo
from focusdpo_jax.profiling.chips import Chip
from focusdpo_jax.training.memory import bytes_per_device

HELD_ALONE = "the arrays held during the program already exceed the memory"
"""The "refused" of a program that is not compiled."""

_USED = re.compile(r"[Uu]sed ([\d.]+)([KMG])|required[^(]*\(([\d.]+)([KMG])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def compile_program(
    program: programs.RunProgram, chip: Chip, devices: int
) -> tuple[dict[str, Any], hlo.Program | None, flops.Operations | None]:
    """Compiles a program.

    Args:
      program: the program.
      chip: the `Chip` to compile for.
      devices: number of chips.

    Returns:
      (its entry in the "programs" of `planner.plan`, its text, its operations). The last two are
      None if it is not compiled because the held arrays do not fit; the text is None if the
      compiler refuses it.
    """
    held, start = bytes_per_chip(program.held), time.monotonic()
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
            | {"needs_at_least": held["total"], "refused": HELD_ALONE, "compile_seconds": 0.0},
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
    made["estimate"] = timing.estimate(chip, devices, text, work)
    made["compile_seconds"] = time.monotonic() - start
    return made, text, work


def bytes_per_chip(held: Mapping[str, Any]) -> dict[str, int]:
    """Returns {kind: bytes per chip} of {kind: tree of sharded shapes}, and their "total"."""
    sizes = {kind: bytes_per_device(tree) for kind, tree in held.items()}
    return sizes | {"total": sum(sizes.values())}
