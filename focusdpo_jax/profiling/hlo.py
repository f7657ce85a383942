"""Parses the HLO text of a compiled program: its instructions and their numbers of executions.

Planning reads the collectives (`collectives`), the compiler's estimates (`estimates`), and the
bytes that instructions access from it.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(
    r"^\s*(ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9\-]*)"
    r"\((?P<operands>[^)]*)\)(?P<attributes>.*)$"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:true_computation|false_computation)=%?([\w.\-]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^\d+$")
# Instructions that only name, group or await values.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "while",
        "conditional",
        "call",
        "partition-id",
        "replica-id",
        "iota",
    )
)
_SLICES = ("dynamic-slice", "slice", "gather")


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
      name: name of its value.
      type: type of its value, such as "f32[8,8]{1,0}", or a tuple of such types.
      opcode: operation, such as "fusion" or "all-gather-start".
      operands: names of its operands; for a constant its value, for a parameter its number.
      attributes: the rest of the line.
      computation: name of its computation.
      line: line number in the text, from 0.
      root: whether its value is the result of the computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    computation: str
    line: int
    root: bool

    @property
    def operation(self) -> str:
        """The traced operation, such as "jit(update)/jvp(UNet)/mid_block/..."; "" if unknown."""
        found = _OPERATION.search(self.attributes)
        return found[1] if found else ""

    @property
    def size(self) -> int:
        """Bytes of its value on one device."""
        return sum(array_sizes(self.type))

    @property
    def called(self) -> str | None:
        """Name of the computation of a fusion, call, reduction or asynchronous start, or None."""
        found = _CALLS.search(self.attributes)
        return found[1] if found else None


class Program:
    """The computations of a program.

    Attributes:
      computations: {name: list of Instruction}; the name of instructions outside of computations is
        "".
      entry: name of the entry computation.
      texts: {name: text of the computation}.
    """

    def __init__(self, text: str):
        """Parses `compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.texts: dict[str, str] = {}
        self.entry = ""
        inside, lines = "", text.splitlines()
        first = 0
        for number, line in enumerate(lines):
            if not line.startswith(" "):
                if line == "}":
                    self.texts[inside] = "\n".join(lines[first : number + 1])
                    inside = ""
                elif computation := _COMPUTATION.match(line):
                    inside, first = computation[2], number
                    self.entry = inside if computation[1] else self.entry
                    self.computations[inside] = []
                elif inside and self.computations[inside]:
                    # The attributes of a kernel may span several lines.
                    last = self.computations[inside][-1]
                    self.computations[inside][-1] = last._replace(attributes=last.attributes + line)
                continue
            found = _INSTRUCTION.match(line)
            if found:
                operands = tuple(
                    part.strip().split("%")[-1]
                    for part in found["operands"].split(",")
                    if part.strip()
                )
                self.computations[inside].append(
                    Instruction(
                        found["name"],
                        found["type"],
                        found["opcode"],
                        operands,
                        found["attributes"],
                        inside,
                        number,
                        bool(found[1]),
                    )
                )

    def trips(self, loop: Instruction) -> int | None:
        """Returns the trip count of a `while` instruction, or None if it is unknown."""
        known = _KNOWN_TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        # Otherwise assume a loop from 0 to the only constant in its condition.
        condition = _CONDITION.search(loop.attributes)
        bounds = {
            int(operand)
            for name in self._reached(condition[1] if condition else None)
            for instruction in self.computations[name]
            if instruction.opcode == "constant"
            for operand in instruction.operands
            if _CONSTANT.match(operand)
        }
        return bounds.pop() if len(bounds) == 1 else None

    def _reached(self, name: str | None) -> list[str]:
        """Returns the names of a computation and of those that it calls."""
        found: list[str] = []
        if name in self.computations:
            found.append(name)
            for instruction in self.computations[name]:
                found += self._reached(instruction.called)
        return found

    @functools.cached_property
    def runs(self) -> list[tuple[Instruction, int]]:
        """[(instruction, number of executions)] of all instructions outside fusions and reductions.

        The body of a loop counts as often as it runs, or once if its trip count is unknown
        (`unknown_loops`). Every branch of a conditional counts.
        """
        return list(self._runs(self.entry, 1))

    def _runs(self, name: str | None, times: int) -> Iterator[tuple[Instruction, int]]:
        if name is None:
            return
        for instruction in self.computations.get(name, ()):
            yield instruction, times
            if instruction.opcode == "while":
                yield from self._runs(body(instruction), times * (self.trips(instruction) or 1))
            elif instruction.opcode == "conditional":
                for one, several in _BRANCHES.findall(instruction.attributes):
                    for branch in [one] if one else several.split(","):
                        yield from self._runs(branch.strip().lstrip("%"), times)
            elif instruction.opcode in ("call", "async-start"):
                yield from self._runs(instruction.called, times)

    @functools.cached_property
    def unknown_loops(self) -> list[str]:
        """Names of the loops whose trip count is unknown; they count once."""
        return [
            instruction.name
            for instruction, _ in self.runs
            if instruction.opcode == "while" and self.trips(instruction) is None
        ]

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """Returns all instructions of a fusion, nested ones included; [] for other instructions."""
        if instruction.opcode != "fusion":
            return []
        return [
            inner for name in self._reached(instruction.called) for inner in self.computations[name]
        ]

    @functools.cached_property
    def bytes_accessed(self) -> int:
        """Bytes that instructions read and write, with loops counted as often as they run.

        Slices count with their own size, also those of an operand inside a fusion. In-place updates
        count with the size of the update. Caches are not modelled.
        """
        return sum(times * self._accessed(instruction) for instruction, times in self.runs)

    def _accessed(self, instruction: Instruction) -> int:
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0
        sizes = self._sizes(instruction.computation)
        if instruction.opcode in _SLICES:
            return 2 * instruction.size
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sizes.get(instruction.operands[1], 0)
        name = instruction.called
        called = self.computations.get(name, ()) if name else ()
        if instruction.opcode != "fusion" or not name or not called:
            return sum(array_sizes(instruction.type)) + sum(
                sizes.get(operand, 0) for operand in instruction.operands
            )
        inner = self._sizes(name)
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for each in called:
            for operand in each.operands:
                users[operand].append(each)
        read = 0
        for each in called:
            if each.opcode != "parameter" or not users[each.name]:
                continue
            read += min(
                each.size,
                sum(
                    user.size
                    if user.opcode in _SLICES and user.operands[0] == each.name
                    else 0
                    if user.opcode == "dynamic-update-slice" and user.operands[0] == each.name
                    else each.size
                    for user in users[each.name]
                ),
            )
        root = next((each for each in called if each.root), called[-1])
        by_name = {each.name: each for each in called}
        outputs = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = sum(
            inner.get(each.operands[1], 0) if each.opcode == "dynamic-update-slice" else each.size
            for each in outputs
        )
        return read + written

    def _sizes(self, name: str) -> dict[str, int]:
        if name not in self._known_sizes:
            self._known_sizes[name] = {
                each.name: each.size for each in self.computations.get(name, ())
            }
        return self._known_sizes[name]

    @functools.cached_property
    def _known_sizes(self) -> dict[str, dict[str, int]]:
        return {}

    @functools.cached_property
    def parameter_bytes(self) -> int:
        """Bytes of the program's arguments on one device, without the padding of their layouts."""
        return sum(
            each.size
            for each in self.computations.get(self.entry, ())
            if each.opcode == "parameter"
        )


def body(loop: Instruction) -> str:
    """Returns the name of the computation that a `while` instruction repeats."""
    found = _BODY.search(loop.attributes)
    if not found:
        raise ValueError(f"while instruction {loop.name} without a body: {loop.attributes[:200]}")
    return found[1]


def array_sizes(text: str) -> list[int]:
    """Returns the bytes of each array of a type, in order."""
    return [
        math.prod(int(n) for n in dimensions.split(",") if n) * _BITS[dtype] // 8
        for dtype, dimensions in _ARRAY.findall(text)
        if dtype in _BITS
    ]
