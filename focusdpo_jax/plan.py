"""Plans a run for accelerators that need not be present: memory, communication and time.

    python -m focusdpo_jax.plan --config=configs/sdxl_dpo.py --topology=v5e:4x4 \\
        --config.mesh.fsdp=16 --config.mesh.data=1 --config.batch_size=16
    python -m focusdpo_jax.plan --config=configs/sdxl_dpo.py --topology=h100 --config.batch_size=1
    python -m focusdpo_jax.plan --config=configs/sdxl_dpo.py:lora --topology=v6e:2x4 --search

Compiles every program of the run from shapes, for a TPU topology, for NVIDIA GPUs, or for this
machine's devices. TPUs require libtpu: `pip install 'focusdpo_jax[plan]'`. GPUs require JAX's CUDA
plugin, but no GPU: `pip install 'focusdpo_jax[plan-gpu]'`. Prints the memory and communication of
every chip and, for TPUs, the time that the compiler estimates. If the model's files are missing on
this machine, it plans for SDXL's sizes. If a program does not fit, it prints changes that would
make it fit, and exits with status 2.
"""

import json
import os

from absl import flags
from ml_collections import config_flags

from focusdpo_jax import command

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, such as configs/sdxl_dpo.py, or its name, sdxl_dpo; override fields by "
    "--config.FIELD=VALUE, for example --config.mesh.fsdp=16.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "local",
    "TPU slice such as v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x2; GPUs such as h100:8 "
    "(h100, h100-pcie, h200, b200, a100-40, a100-80, a6000, l4, l40s, rtx4090, rtx5090, "
    "rtx6000pro; more than eight are several machines of eight); or local, this machine's "
    "devices.",
)
_UTILISATION = flags.DEFINE_float(
    "utilisation",
    0.4,
    "Assumed share of the chip's data sheet speed, if the compiler does not estimate "
    "the time (GPUs); it only affects the pairs per second.",
    lower_bound=0.01,
    upper_bound=1.0,
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Try meshes of data and fsdp with --batches pairs per chip; if nothing fits, also "
    "remat, cached encodings and no accumulation, in this order. Recommends the plan that fits "
    "with the most pairs per second and, among equals, the least communication; this plan "
    "includes all programs.",
)
_BATCHES = flags.DEFINE_list(
    "batches", ["1", "2", "4"], "Numbers of pairs per chip that --search tries."
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Compile only the policy's update; the same as --programs=update."
)
_PROGRAMS = flags.DEFINE_list(
    "programs",
    None,
    "Programs to compile: update, sampling, encoding, reference pass, focus maps, probe. "
    "Default: all programs of the run.",
)


def main():
    """Reads the flags and runs `planning.planner` or `planning.search`."""
    # Only the compiler of libtpu is used; without this its runtime would search for a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several processes may use the compiler at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if _TOPOLOGY.value != "local":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from focusdpo_jax import config as config_lib
    from focusdpo_jax import objectives
    from focusdpo_jax.errors import UserError
    from focusdpo_jax.planning import planner, programs, report, search

    config = config_lib.parse(_CONFIG.value)
    if not objectives.get(config.objective).trains_generator:
        names = objectives.names()
        generators = ", ".join(n for n in names if objectives.get(n).trains_generator)
        raise UserError(
            f"config.objective = {config.objective!r}: only the training of a generator can be "
            f"planned; choose one of {generators}"
        )
    utilisation = _UTILISATION.value
    only = ["update"] if _QUICK.value else _PROGRAMS.value
    unknown = sorted(set(only or ()) - set(programs.NAMES))
    if unknown:
        raise UserError(
            f"--programs={','.join(only or ())}: {unknown[0]!r} is none of "
            f"{', '.join(programs.NAMES)}"
        )
    if _SEARCH.value and _PROGRAMS.value:
        raise UserError(
            "--search compiles updates, then all programs of its recommendation; "
            "give no --programs, or --quick for the updates alone"
        )
    if not _SEARCH.value:
        _show(planner.plan(config, _TOPOLOGY.value, only=only, utilisation=utilisation))
        return
    try:
        batches = [int(value) for value in _BATCHES.value]
    except ValueError as error:
        raise UserError(f"--batches={','.join(_BATCHES.value)}: give whole numbers") from error
    quiet = _JSON.value

    def show(found):
        if not quiet:
            print(
                report.table(found)
                if isinstance(found, dict)
                else f"refused: {str(found).strip().splitlines()[0][:200]}",
                flush=True,
            )

    plans = search.search(
        config,
        _TOPOLOGY.value,
        batches=batches,
        report=show,
        only=("update",),
        utilisation=utilisation,
    )
    best = (
        plans[0]
        if _QUICK.value
        else search.plan_recommended(
            config, _TOPOLOGY.value, plans[0]["changes"], utilisation=utilisation
        )
    )
    if quiet:
        print(json.dumps({"recommended": best, "all": plans}, indent=2), flush=True)
        _refuse(best)
    else:
        print(
            "\nrecommended: "
            + " ".join(f"--config.{field}={value}" for field, value in best["changes"].items())
        )
        _show(best)


def _show(found):
    """Prints a plan, and refuses it if a program does not fit."""
    from focusdpo_jax.planning import report

    print(json.dumps(found, indent=2) if _JSON.value else report.table(found), flush=True)
    _refuse(found)


def _refuse(found):
    """Raises a UserError if a program of a plan does not fit."""
    from focusdpo_jax.errors import UserError
    from focusdpo_jax.planning import report

    if found["fits"] is False:
        raise UserError(f"--topology={_TOPOLOGY.value}: {report.refusal(found)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main, command.config_parser(_CONFIG))
