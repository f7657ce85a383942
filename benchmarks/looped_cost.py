"""XLA's count of a compiled program's operations and bytes, with loops as often as they run.

`Compiled.cost_analysis` takes the body of a loop once. Here each body is handed to the same analysis as
a program of its own. Read from the program's text, by functions of jaxlib that are not public: a
benchmark's means, not a library's.
"""

import itertools

import jax
from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]: compiled modules

from focusdpo_jax.profiling import hlo


def count(compiled):
    """(operations, bytes accessed) of a `jax.stages.Compiled`.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    program, once = hlo.Program(compiled.as_text()), {}

    def bodies_once(name):
        if name not in once:
            # What a computation calls stands before it.
            called = itertools.takewhile(lambda other: other != name, program.texts)
            texts = [program.texts[other].removeprefix("ENTRY ") for other in (*called, name)]
            module = "\n\n".join(
                ["HloModule counted, is_scheduled=true", *texts[:-1], f"ENTRY {texts[-1]}"]
            )
            found = _jax.hlo_module_cost_analysis(
                jax.devices("cpu")[0].client, _hlo.hlo_module_from_text(module)
            )
            once[name] = found["flops"], found["bytes accessed"]
        return once[name]

    def total(name):
        counts = list(bodies_once(name))
        for loop in program.computations[name]:
            if loop.opcode != "while":
                continue
            trips, body = program.trips(loop), hlo.body(loop)
            if trips is None:
                raise ValueError(f"how often does {loop.name} run?")
            each = zip(total(body), bodies_once(body), strict=True)
            counts = [
                sum(counted)
                for counted in zip(
                    counts, (trips * whole - part for whole, part in each), strict=True
                )
            ]
        return counts

    return tuple(total(program.entry))
