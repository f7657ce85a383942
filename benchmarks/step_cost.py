"""What a step costs in counts that no machine changes, beside what it cost when that was recorded.

    python benchmarks/step_cost.py            # prints what differs from benchmarks/step_cost.json
    python benchmarks/step_cost.py --record   # a change is meant: writes that file

For the step of each case, as it is traced (`profiling/flops.py`): operations of matrix products
and convolutions, and of everything else, in the reference passes (`guide`) and in the update. For Toybox's update,
compiled for a CPU: bytes that XLA says it reads and writes, the body of a loop once, and its
temporary memory. A test compares them: products with any jax, the rest with the jax that the record
names, since other versions trace and fuse differently.
"""

import argparse
import json
import pathlib
from typing import Any, cast

import jax
from benchmark_cases import load_config

from focusdpo_jax.profiling import flops
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import shapes
from focusdpo_jax.training.step import trace_step

RECORD = pathlib.Path(__file__).with_suffix(".json")
CASES = {"toybox": ("toybox_dpo",), "debug": ("sdxl_dpo", "debug")}
COMPILED = "toybox"
# Compiled bytes may differ a little between processors.
TOLERANCE = 0.02
CURE = "if that is meant, record it: python benchmarks/step_cost.py --record"


def traced(name: str):
    """{program: jax.stages.Traced} of a case's step."""
    config = load_config(*CASES[name])
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size, jax.devices()[:1])
    step = shapes.abstract_step(config, mesh)
    passes, update = trace_step(
        step.assembly.definition,
        step.optimizer,
        step.state,
        step.batch,
        step.key,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )
    return {f"guide {structure}": trace() for structure, trace in passes.items()} | {
        "update": update()
    }


def measure():
    """{"jax": version, "cases": {case: {program: {name: count}}}}."""
    cases = {}
    for name in CASES:
        programs = traced(name)
        cases[name] = {program: flops.count(found)._asdict() for program, found in programs.items()}
        if name == COMPILED:
            # How well the code is compiled changes no byte, but the time that it takes.
            compiled: Any = (
                programs["update"]
                .lower()
                .compile(compiler_options=cast(Any, {"xla_backend_optimization_level": 0}))
            )
            cases[name]["update"] |= {
                "bytes": compiled.cost_analysis()["bytes accessed"],
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
    return {"jax": jax.__version__, "cases": cases}


def differences(record, found) -> list[str]:
    """Lines that say what no longer is as recorded; none if all is."""
    lines, same_jax = [], record["jax"] == found["jax"]
    for case, programs in record["cases"].items():
        for program, counts in programs.items():
            for name, old in counts.items():
                new = found["cases"].get(case, {}).get(program, {}).get(name)
                if new is None:
                    lines.append(f"{case}, {program}: there is no such program any more; {CURE}")
                    break
                if name == "matmul_flops":
                    wrong = new != old
                elif name == "others":
                    wrong = same_jax and new != old
                else:
                    wrong = same_jax and new > old * (1 + TOLERANCE)
                if wrong:
                    lines.append(
                        f"{case}, {program}: {name} {old:.6g} are {new:.6g} now "
                        f"({new / old - 1:+.2%}); {CURE}"
                    )
    return lines


def main() -> None:
    """Compares or records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    record, found = parser.parse_args().record, measure()
    if record:
        RECORD.write_text(json.dumps(found, indent=2) + "\n")
        return
    lines = differences(json.loads(RECORD.read_text()), found)
    print("\n".join(lines) or "as recorded")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
