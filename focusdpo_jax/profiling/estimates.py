"""Estimates the time of a compiled program: the TPU compiler's own estimate, or a roofline.

The TPU compiler annotates fusions, convolutions, copies and so on with `estimated_cycles` from a
model of the chip. Their sum, with loops counted as often as they run, is the time of the program
without stalls: asynchronous transfers between memories and between chips have no estimate. Pallas
kernels have none either; their products at the chip's full speed are added as a lower bound. A copy
from one layout to another within the chip's fast memory, as beside an attention kernel, has only a
nominal estimate, `NOMINAL` cycles for each block of the array. These estimates have not been
compared with measured times.

The GPU compiler provides no estimates. There the roofline is used: the larger of the time of all
products at full speed and the time of all bytes at full bandwidth, without caches.
"""

import collections
import dataclasses
import math
import re

from focusdpo_jax.profiling import hlo
from focusdpo_jax.profiling.chips import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BLOCKS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
# Cycles that the compiler assumes for each block of a copy within fast memory.
NOMINAL = 100
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# Custom calls that compute nothing.
_BOOKKEEPING = (
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
)
_PRODUCTS = ("convolution", "dot")
_LAYER = re.compile(r"(blocks|attentions|resnets|samplers|layers)_\d+")
# Methods and functions within a module, and JAX's wrappers of functions.
_NO_PLACE = re.compile(r"\._|<lambda>|^(jit|vmap|jvp|transpose)\(")
_WRAPPERS = (
    "checkpoint",
    "rematted_computation",
    "while",
    "body",
    "closed_call",
    "cond",
    "shard_map",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate of the time of a program on one chip.

    Attributes:
      cycles: sum over all instructions with an estimate.
      kinds: {kind: cycles}, largest first. Kinds are "products" (matrix products and convolutions
        with fused operations), "fusions" (all other fusions), and opcodes.
      sources: [(name, cycles, number of executed instructions)], largest first; see `source`.
      kernels: {target: number of executions} of custom calls, which have no estimate.
      nominal_copies: number of executed copies with a nominal estimate.
      nominal_bytes: bytes of their results.
      unknown_loops: number of loops that count once because their trip count is unknown.
    """

    cycles: float
    kinds: dict[str, float]
    sources: list[tuple[str, float, int]]
    kernels: dict[str, int]
    nominal_copies: int
    nominal_bytes: int
    unknown_loops: int


def read(program: hlo.Program) -> Estimate:
    """Returns the Estimate of a program compiled for a TPU."""
    kinds: collections.Counter[str] = collections.Counter()
    sources: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    nominal: collections.Counter[str] = collections.Counter()
    for instruction, times in program.runs:
        found = _CYCLES.search(instruction.attributes)
        if found:
            cycles, name = int(found[1]) * times, source(program, instruction)
            kinds[_kind(program, instruction)] += cycles
            sources[name] += cycles
            counts[name] += times
            if _is_nominal(instruction, int(found[1])):
                nominal["copies"] += times
                nominal["bytes"] += instruction.size * times
        elif instruction.opcode == "custom-call":
            target = _TARGET.search(instruction.attributes)
            if target and target[1] not in _BOOKKEEPING:
                kernels[target[1]] += times
    return Estimate(
        sum(kinds.values()),
        dict(kinds.most_common()),
        [(name, cycles, counts[name]) for name, cycles in sources.most_common()],
        dict(kernels.most_common()),
        nominal["copies"],
        nominal["bytes"],
        len(program.unknown_loops),
    )


def _is_nominal(instruction: hlo.Instruction, cycles: int) -> bool:
    blocks = _BLOCKS.search(instruction.attributes)
    if instruction.opcode != "copy" or blocks is None:
        return False
    return cycles == NOMINAL * math.prod(int(each.strip('"')) for each in blocks[1].split(","))


def _kind(program: hlo.Program, instruction: hlo.Instruction) -> str:
    opcodes = {instruction.opcode} | {each.opcode for each in program.inside(instruction)}
    if opcodes & set(_PRODUCTS):
        return "products"
    return "fusions" if instruction.opcode == "fusion" else instruction.opcode


def source(program: hlo.Program, instruction: hlo.Instruction) -> str:
    """Returns the layer and operation of an instruction; repeated layers have the same name.

    For example "backward: up_blocks_N/attentions_N/transformer_blocks_N/attn1/to_q/dot_general".
    Instructions that the compiler added are named after the most frequent operation fused in them,
    or after their opcode.
    """
    name = instruction.operation
    if "/" not in name:
        inner = collections.Counter(
            each.operation for each in program.inside(instruction) if "/" in each.operation
        )
        name = inner.most_common(1)[0][0] if inner else ""
    return short_name(name) or f"({instruction.opcode} of the compiler's)"


def short_name(operation: str) -> str:
    """Removes JAX's wrappers and layer numbers from an `op_name`; prepends its pass or program."""
    if "/" not in operation:
        return ""
    parts = _split(operation)
    kept = []
    for part in parts[1:]:
        if part in kept[:1] and len(kept) > 1:
            kept = []  # Flax repeats the path of a module that is differentiated.
        if part not in _WRAPPERS and not _NO_PLACE.search(part):
            kept.append(part)
    path = _LAYER.sub(r"\1_N", "/".join(kept or parts[-1:]))
    if "rematted_computation" in parts:
        when = "recomputed"
    elif any(part.startswith("transpose(") for part in parts):
        when = "backward"
    elif any(part.startswith("jvp(") for part in parts):
        when = "forward"
    else:  # No differentiation, as in the optimiser or in other programs.
        when = parts[0].removeprefix("jit(").rstrip(")")
    return f"{when}: {path}"


def _split(operation: str) -> list[str]:
    """Splits a name at the slashes outside of parentheses."""
    parts, depth, part = [], 0, ""
    for letter in operation:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [*parts, part]


def seconds(estimate: Estimate, chip: Chip, kernel_products: float) -> float:
    """Returns the seconds of a program on one TPU chip, without transfers.

    Args:
      estimate: the `Estimate` of the program.
      chip: the `Chip`.
      kernel_products: floating-point operations in kernels without an estimate, on one chip.
    """
    return estimate.cycles / chip.clock + kernel_products / chip.flops


def roofline(chip: Chip, products: float, accessed: float) -> dict[str, float]:
    """Returns the time of a program's products and memory accesses on one chip at full speed.

    Args:
      chip: the `Chip`.
      products: floating-point operations of matrix products on one chip.
      accessed: bytes that the program reads and writes on one chip.

    Returns:
      {"products": seconds, "bytes": seconds}.
    """
    return {"products": products / chip.flops, "bytes": accessed / chip.bandwidth}
