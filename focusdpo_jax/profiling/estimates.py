"""How long a compiled program would take: the TPU compiler's own estimate, or a lower bound.

The compiler for TPUs writes `estimated_cycles` beside every fusion, convolution, copy and so on, by a
model of the chip. Their sum, loops as often as they run, is the time of a program in which nothing
waits: transfers between memories and between chips, which run beside, have no estimate. Neither have
Pallas kernels, of which the products at the chip's full speed are added, a lower bound. These
estimates have not been compared with measured times.

The compiler for GPUs estimates nothing. What remains is the roofline: products at full speed, or bytes at
full bandwidth, as if no cache served any, whichever takes longer.
"""

import collections
import dataclasses
import re
from typing import TYPE_CHECKING

from focusdpo_jax.profiling import hlo

if TYPE_CHECKING:
    from focusdpo_jax.planning.chips import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
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
      cycles: of all instructions with an estimate.
      kinds: {kind: cycles}, the most first: "products" are matrix products and convolutions with what
        is fused to them, "fusions" everything else that is fused, and opcodes.
      sources: [(name, cycles, how many instructions run)], the most first; see `source`.
      kernels: {target: how many run} of custom calls, which have no estimate.
      unknown_loops: how many loops count once because the program does not say how often they run.
    """

    cycles: float
    kinds: dict[str, float]
    sources: list[tuple[str, float, int]]
    kernels: dict[str, int]
    unknown_loops: int


def read(program: hlo.Program) -> Estimate:
    """Returns the Estimate of a program compiled for a TPU."""
    kinds: collections.Counter[str] = collections.Counter()
    sources: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for instruction, times in program.runs:
        found = _CYCLES.search(instruction.attributes)
        if found:
            cycles, name = int(found[1]) * times, source(program, instruction)
            kinds[_kind(program, instruction)] += cycles
            sources[name] += cycles
            counts[name] += times
        elif instruction.opcode == "custom-call":
            target = _TARGET.search(instruction.attributes)
            if target and target[1] not in _BOOKKEEPING:
                kernels[target[1]] += times
    return Estimate(
        sum(kinds.values()),
        dict(kinds.most_common()),
        [(name, cycles, counts[name]) for name, cycles in sources.most_common()],
        dict(kernels.most_common()),
        len(program.unknown_loops),
    )


def _kind(program: hlo.Program, instruction: hlo.Instruction) -> str:
    opcodes = {instruction.opcode} | {each.opcode for each in program.inside(instruction)}
    if opcodes & set(_PRODUCTS):
        return "products"
    return "fusions" if instruction.opcode == "fusion" else instruction.opcode


def source(program: hlo.Program, instruction: hlo.Instruction) -> str:
    """Returns the layer and operation that an instruction was compiled from, equal for equal layers.

    Such as "backward: up_blocks_N/attentions_N/transformer_blocks_N/attn1/to_q/dot_general". What the
    compiler made by itself is named after most of what is fused in it, or else after its opcode.
    """
    name = instruction.operation
    if "/" not in name:
        inner = collections.Counter(
            each.operation for each in program.inside(instruction) if "/" in each.operation
        )
        name = inner.most_common(1)[0][0] if inner else ""
    return short_name(name) or f"({instruction.opcode} of the compiler's)"


def short_name(operation: str) -> str:
    """Strips JAX's wrappers and layer numbers from an `op_name` and prepends its pass or program."""
    if "/" not in operation:
        return ""
    parts = _split(operation)
    kept = []
    for part in parts[1:]:
        if part in kept[:1] and len(kept) > 1:
            kept = []  # Flax writes the path of a module that is differentiated again behind the first.
        if part not in _WRAPPERS and not _NO_PLACE.search(part):
            kept.append(part)
    path = _LAYER.sub(r"\1_N", "/".join(kept or parts[-1:]))
    if "rematted_computation" in parts:
        when = "recomputed"
    elif any(part.startswith("transpose(") for part in parts):
        when = "backward"
    elif any(part.startswith("jvp(") for part in parts):
        when = "forward"
    else:  # Nothing is differentiated here: in the optimiser, or in another program.
        when = parts[0].removeprefix("jit(").rstrip(")")
    return f"{when}: {path}"


def _split(operation: str) -> list[str]:
    """The parts of a name between slashes that are in no parenthesis."""
    parts, depth, part = [], 0, ""
    for letter in operation:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [*parts, part]


def seconds(estimate: Estimate, chip: "Chip", kernel_products: float) -> float:
    """Returns the seconds of a program on one TPU chip, without transfers.

    Args:
      estimate: of the program.
      chip: a `chips.Chip`.
      kernel_products: floating-point operations in kernels without an estimate, on one chip.
    """
    return estimate.cycles / chip.clock + kernel_products / chip.flops


def roofline(chip: "Chip", products: float, accessed: float) -> dict[str, float]:
    """Returns the time of a program's products and of its bytes on one chip, each at full speed.

    Args:
      products: floating-point operations on one chip.
      accessed: bytes that it reads and writes there.

    Returns:
      {"products": seconds, "bytes": seconds}.
    """
    return {"products": products / chip.flops, "bytes": accessed / chip.bandwidth}
