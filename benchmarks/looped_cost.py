"""XLA's count of a compiled program's operations and bytes, with loops as often as they run.

`Compiled.cost_analysis` takes the body of a loop once. Here each body is handed to the same analysis as
a program of its own. Read from the program's text, by functions of jaxlib that are not public: a
benchmark's means, not a library's.
"""

import itertools
import re

import jax
from jaxlib import _hlo, _jax

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*?^}$", re.MULTILINE | re.DOTALL)
_WHILE = re.compile(r" while\(.*?condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")


def count(compiled):
    """(operations, bytes accessed) of a `jax.stages.Compiled`.

    Raises:
      ValueError: a loop's condition does not compare with one constant.
    """
    computations, entry = {}, None
    for match in _COMPUTATION.finditer(compiled.as_text()):
        text = match.group()
        if text.startswith("ENTRY "):
            entry, text = match["name"], text.removeprefix("ENTRY ")
        computations[match["name"]] = text
    once = {}

    def bodies_once(name):
        if name not in once:
            # What a computation calls stands before it.
            called = itertools.takewhile(lambda other: other != name, computations)
            module = "\n\n".join(["HloModule counted, is_scheduled=true",
                                  *(computations[other] for other in called),
                                  f"ENTRY {computations[name]}"])
            found = _jax.hlo_module_cost_analysis(
                jax.devices("cpu")[0].client, _hlo.hlo_module_from_text(module))
            once[name] = found["flops"], found["bytes accessed"]
        return once[name]

    def total(name):
        counts = list(bodies_once(name))
        for loop in _WHILE.finditer(computations[name]):
            trips = _trips(computations[loop["condition"]])
            each = zip(total(loop["body"]), bodies_once(loop["body"]), strict=True)
            counts = [sum(counted) for counted in zip(
                counts, (trips * whole - part for whole, part in each), strict=True)]
        return counts

    return tuple(total(entry))


def _trips(condition):
    constants = re.findall(r" constant\((\d+)\)", condition)
    if len(constants) != 1:
        raise ValueError(f"how often does a loop run that goes on while\n{condition}")
    return int(constants[0])
