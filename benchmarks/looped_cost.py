"""XLA's count of a compiled program's operations and bytes, with loops multiplied by trip counts.

`Compiled.cost_analysis` counts the body of a loop once. Here each body is passed to the same
analysis as a separate program, which is built from the program's text. This uses private functions
of jaxlib, which is acceptable in a benchmark only.
"""

import itertools

import jax
from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]: compiled modules

from focusdpo_jax.profiling import hlo


def count(compiled):
    """Returns (operations, bytes accessed) of a `jax.stages.Compiled`.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    program, counted = hlo.Program(compiled.as_text()), {}

    def count_bodies_once(name):
        if name not in counted:
            # The text of a computation follows those that it calls.
            called = itertools.takewhile(lambda other: other != name, program.texts)
            texts = [program.texts[other].removeprefix("ENTRY ") for other in (*called, name)]
            module = "\n\n".join(
                ["HloModule counted, is_scheduled=true", *texts[:-1], f"ENTRY {texts[-1]}"]
            )
            cost = _jax.hlo_module_cost_analysis(
                jax.devices("cpu")[0].client, _hlo.hlo_module_from_text(module)
            )
            counted[name] = cost["flops"], cost["bytes accessed"]
        return counted[name]

    def total(name):
        counts = list(count_bodies_once(name))
        for loop in program.computations[name]:
            if loop.opcode != "while":
                continue
            trips, body = program.trips(loop), hlo.body(loop)
            if trips is None:
                raise ValueError(f"{loop.name}: unknown trip count")
            each = zip(total(body), count_bodies_once(body), strict=True)
            counts = [
                sum(counted)
                for counted in zip(
                    counts, (trips * whole - part for whole, part in each), strict=True
                )
            ]
        return counts

    return tuple(total(program.entry))
