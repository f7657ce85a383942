"""What devices tell each other in a compiled program, read from its HLO."""

import dataclasses
import functools
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
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
# What an instruction runs: a loop's body, and whatever else has instructions of its own.
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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
      times: how often it runs: inside loops once for every turn, as far as the compiler knows it.
    """

    name: str
    kind: str
    size: int
    operands: tuple[str, ...]
    operation: str
    line: int
    times: int = 1


def read(text):
    """The collectives of a program in the order of the text, a list of Collective.

    Args:
      text: `compiled.as_text()`.
    """
    lines = text.splitlines()
    found, times, inside = [], _runs(lines), None
    for number, line in enumerate(lines):
        if (computation := _COMPUTATION.match(line)):
            inside = computation[2]
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
            operation[1] if operation else "", number, times.get(inside, 1)))
    return found


def _runs(lines):
    """{computation: how often the program runs it}."""
    callers, entry, inside = {}, None, None
    for line in lines:
        if (computation := _COMPUTATION.match(line)):
            inside = computation[2]
            entry = inside if computation[1] else entry
            continue
        body, trips = _BODY.search(line), _TRIPS.search(line)
        if body:
            callers.setdefault(body[1], []).append((inside, int(trips[1]) if trips else 1))
        called = _CALLED.findall(line)
        if (branches := _BRANCHES.search(line)):
            called += [name.strip().lstrip("%") for name in branches[1].split(",")]
        for name in called:
            callers.setdefault(name, []).append((inside, 1))

    @functools.cache
    def runs(name):
        if name == entry:
            return 1
        return sum(trips * runs(caller) for caller, trips in callers.get(name, ()))

    return {name: runs(name) for name in callers} | {entry: 1}


def summary(found):
    """{kind: {"count": how often one runs, "bytes": of all of them}} of a list of Collective."""
    return {kind: {"count": sum(c.times for c in of_kind),
                   "bytes": sum(c.times * c.size for c in of_kind)} for kind in KINDS
            if (of_kind := [c for c in found if c.kind == kind])}


def _size(dtype, dimensions):
    if dtype not in _BITS:
        return 0
    return math.prod(int(n) for n in dimensions.split(",") if n) * _BITS[dtype] // 8
