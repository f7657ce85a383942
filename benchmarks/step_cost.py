"""Compares machine-independent costs of a step with recorded values.

    python benchmarks/step_cost.py            # prints differences from benchmarks/step_cost.json
    python benchmarks/step_cost.py --record   # writes that file, after an intended change

For the traced step of each case (`profiling/flops.py`), counts the operations of matrix products
and convolutions, and all others, in the reference passes (`guide` in the file) and in the update.
For Toybox's update, compiled for a CPU, also counts its temporary memory and the bytes that XLA
reports as accessed, with the body of a loop once. A test compares the counts: products with any
version of jax, the others with the recorded version, since other versions trace and fuse
differently.
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
HINT = "if this is intended, record it: python benchmarks/step_cost.py --record"


def traced(name: str):
    """The programs of a case's step, {name: jax.stages.Traced}."""
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
    """Returns {"jax": version, "cases": {case: {program: {name: count}}}}."""
    cases = {}
    for name in CASES:
        programs = traced(name)
        cases[name] = {program: flops.count(trace)._asdict() for program, trace in programs.items()}
        if name == COMPILED:
            # Level 0 compiles fastest and does not change the bytes.
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


def differences(record, measured) -> list[str]:
    """Returns one line per count that differs from the record."""
    lines, same_jax = [], record["jax"] == measured["jax"]
    for case, programs in measured["cases"].items():
        added = programs.keys() - record["cases"].get(case, {}).keys()
        lines += [f"{case}, {program}: a new program; {HINT}" for program in sorted(added)]
    for case, programs in record["cases"].items():
        for program, counts in programs.items():
            for name, old in counts.items():
                new = measured["cases"].get(case, {}).get(program, {}).get(name)
                if new is None:
                    lines.append(f"{case}, {program}: no such program any more; {HINT}")
                    break
                if name == "matmul_flops":
                    wrong = new != old
                elif name == "others":
                    wrong = same_jax and new != old
                else:
                    wrong = same_jax and new > old * (1 + TOLERANCE)
                if wrong:
                    lines.append(
                        f"{case}, {program}: {name} {old:.6g} -> {new:.6g}"
                        + (f" ({new / old - 1:+.2%})" if old else "")
                        + f"; {HINT}"
                    )
    return lines


def main() -> None:
    """Compares the costs with the record, or records them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    record, measured = parser.parse_args().record, measure()
    if record:
        RECORD.write_text(json.dumps(measured, indent=2) + "\n")
        return
    lines = differences(json.loads(RECORD.read_text()), measured)
    print("\n".join(lines) or "as recorded")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
