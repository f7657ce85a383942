"""What devices tell each other in a compiled program, read from its HLO."""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
         "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) "
    rf"(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<operands>[^)]*)\)(?P<rest>.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERATION = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation among devices.

    Attributes:
      name: of its value in the program.
      kind: one of `KINDS`.
      size: bytes of its result on one device.
      operands: names of what goes in.
      operation: where it comes from, such as "jit(update)/jvp(UNet)/mid_block/...".
      line: of the program.
    """

    name: str
    kind: str
    size: int
    operands: tuple[str, ...]
    operation: str
    line: int


def read(text):
    """The collectives of a program in the order of the text, a list of Collective.

    Args:
      text: `compiled.as_text()`. A program with loops names a collective once, however often it
        runs.
    """
    found = []
    for number, line in enumerate(text.splitlines()):
        match = _LINE.match(line)
        if not match:
            continue
        arrays = [_size(*array) for array in _ARRAY.findall(match["type"])]
        # The result of a start holds its input as well.
        size = max(arrays, default=0) if match["start"] else sum(arrays)
        operation = _OPERATION.search(match["rest"])
        found.append(Collective(
            match["name"], match["kind"], size,
            tuple(name.strip().split("%")[-1] for name in match["operands"].split(",")),
            operation[1] if operation else "", number))
    return found


def summary(found):
    """{kind: {"count": number, "bytes": their sum}} of a list of Collective."""
    return {kind: {"count": len(sizes), "bytes": sum(sizes)} for kind in KINDS
            if (sizes := [c.size for c in found if c.kind == kind])}


def _size(dtype, dimensions):
    if dtype not in _BITS:
        return 0
    return math.prod(int(n) for n in dimensions.split(",") if n) * _BITS[dtype] // 8
