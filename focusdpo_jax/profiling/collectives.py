"""Reads the collectives of a compiled program from its HLO text.

XLA's TPU backend fuses collectives, in two ways:

- An asynchronous collective is several fusions: one that starts it, matmuls that proceed with it,
  and one that waits for it. Each contains the same instruction, with the same channel.
- A reduce-scatter is a fusion of an all-reduce with the slice of its result that a device keeps.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from focusdpo_jax.profiling import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=(?:mesh|@\w+|)\[?([^\]]*)\]? ?\{([^}]*)\}")
_AXIS = re.compile(r"'([\w.\-]+)'=(\d+)")
_NAMED = re.compile(r"'([\w.\-]+)'")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# Name of the computation of a fused reduce-scatter.
_REDUCE_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      name: name of its value in the program.
      kind: one of `KINDS`.
      size: bytes of its result on one device.
      operands: names of its operands.
      operation: the traced operation, such as "jit(update)/jvp(UNet)/mid_block/...".
      line: its line in the program.
      times: number of executions; a loop counts each iteration if the compiler knows their number.
      group: number of devices in a replica group; 0 if the text does not state it.
    """

    name: str
    kind: str
    size: int
    operands: tuple[str, ...]
    operation: str
    line: int
    times: int = 1
    group: int = 0

    def received(self, devices: int) -> float:
        """Returns the bytes that one device receives per execution, assuming ring algorithms.

        Args:
          devices: number of devices of the mesh, for a group of unknown size.
        """
        count = self.group or devices
        share = (count - 1) / count
        return (
            self.size
            * {
                "all-gather": share,
                "all-reduce": 2 * share,
                "reduce-scatter": count - 1,
                "all-to-all": share,
                "collective-permute": 1,
            }[self.kind]
        )


def read(program: hlo.Program | str) -> list[Collective]:
    """Returns the collectives of a program in the order of execution.

    Args:
      program: `hlo.Program`, or its text.
    """
    program = hlo.Program(program) if isinstance(program, str) else program
    found = []
    started: set[tuple[str, str]] = set()  # (computation, channel) of those inside fusions.
    for instruction, times in program.runs:
        for inner in program.inside(instruction):
            channel = _CHANNEL.search(inner.attributes)
            key = (instruction.computation, channel[1] if channel else inner.name)
            if inner.opcode in KINDS and key not in started:
                started.add(key)
                found.append(_fused(instruction, inner, times))
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        sizes, count = hlo.array_sizes(instruction.type), len(instruction.operands)
        if instruction.opcode.endswith("-start") and len(sizes) >= 2 * count:
            sizes = sizes[count : 2 * count]  # The result of a start includes its operands.
        found.append(
            Collective(
                instruction.name,
                kind,
                sum(sizes),
                instruction.operands,
                instruction.operation,
                instruction.line,
                times,
                _group(instruction.attributes),
            )
        )
    return found


def _fused(fusion: hlo.Instruction, inner: hlo.Instruction, times: int) -> Collective:
    """Returns the collective `inner` of a fusion."""
    scatters = inner.opcode == "all-reduce" and _REDUCE_SCATTER in inner.computation
    return Collective(
        inner.name,
        "reduce-scatter" if scatters else inner.opcode,
        fusion.size if scatters else inner.size,
        inner.operands,
        inner.operation or fusion.operation,
        inner.line,
        times,
        _group(inner.attributes),
    )


def _group(attributes: str) -> int:
    """Returns the size of a replica group in any of XLA's notations; 0 if there is none."""
    if listed := _LISTED.search(attributes):
        return len(listed[1].split(","))
    if counted := _COUNTED.search(attributes):
        return int(counted[1])
    if mesh := _MESH.search(attributes):
        sizes = {name: int(size) for name, size in _AXIS.findall(mesh[1])}
        return math.prod(sizes.get(name, 1) for name in _NAMED.findall(mesh[2])) if sizes else 0
    return 0


def summary(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Returns {kind: {"count": number of executions, "bytes": their total bytes}}."""
    found = list(found)
    return {
        kind: {
            "count": sum(c.times for c in of_kind),
            "bytes": sum(c.times * c.size for c in of_kind),
        }
        for kind in KINDS
        if (of_kind := [c for c in found if c.kind == kind])
    }


def received(found: Iterable[Collective], devices: int) -> float:
    """Returns the bytes that each of `devices` receives in one run of the program."""
    return sum(c.times * c.received(devices) for c in found)
