"""What a run would need of accelerators that are not there, before anyone pays for them.

    python -m focusdpo_jax.plan --config=configs/sdxl_dpo.py --topology=v5e:4x4 --config.mesh.fsdp=16 \
        --config.mesh.data=1 --config.batch_size=16
    python -m focusdpo_jax.plan --config=configs/sdxl_dpo.py:lora --topology=v6e:2x4 --search

Compiles the run's own step, from shapes alone, for a TPU topology (with libtpu, which
`pip install 'focusdpo_jax[plan]'` brings) or for this machine's devices, and prints what every chip
would hold and tell the others. Where the model's files are not here it plans for SDXL's sizes.
"""

import json
import os

from absl import flags
from ml_collections import config_flags

from focusdpo_jax import command

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/sdxl_dpo.py; override fields by "
    "--config.FIELD=VALUE, for example --config.mesh.fsdp=16.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "TPU slice such as v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x2; or local, this "
    "machine's devices.")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.4, "Share of the chip's speed on paper that is expected of it; it decides the "
    "pairs a second, and nothing else.", lower_bound=0.01, upper_bound=1.0)
_JSON = flags.DEFINE_bool("json", False, "Print JSON and not a table.")
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try splits into data and fsdp, --batches pairs a chip, and remat off and on, each "
    "as far as it may fit; recommend what fits, promises most pairs a second and tells other chips "
    "least.")
_BATCHES = flags.DEFINE_list("batches", ["1", "2", "4"], "Pairs a chip that --search tries.")
_QUICK = flags.DEFINE_bool(
    "quick", False, "Compile the policy's update alone, which needs most memory; what the reference "
    "model's passes tell other chips is then left out.")


def main():
    """Flags, then `planning.planner`."""
    # A TPU's runtime would look for a TPU; only its compiler is wanted.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Of compilers there may be several.
    if _TOPOLOGY.value != "local":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from focusdpo_jax import config as config_rules
    from focusdpo_jax.errors import UserError
    from focusdpo_jax.planning import planner
    config = _CONFIG.value
    config_rules.validate(config)
    if config.objective not in config_rules.GENERATOR_OBJECTIVES:
        raise UserError(f"config.objective = {config.objective!r}: a plan is for the training of a "
                        f"generator; choose one of {', '.join(config_rules.GENERATOR_OBJECTIVES)}")
    options = {"utilisation": _UTILISATION.value, "structures": 0 if _QUICK.value else None}
    if not _SEARCH.value:
        found = planner.plan(config, _TOPOLOGY.value, **options)
        print(json.dumps(found, indent=2) if _JSON.value else planner.table(found))
        return
    try:
        batches = [int(value) for value in _BATCHES.value]
    except ValueError as error:
        raise UserError(f"--batches={','.join(_BATCHES.value)}: give whole numbers") from error
    quiet = _JSON.value

    def report(found):
        if not quiet:
            print(planner.table(found) if isinstance(found, dict)
                  else f"refused: {str(found).strip().splitlines()[0][:200]}", flush=True)

    plans = planner.search(config, _TOPOLOGY.value, batches=batches, report=report, **options)
    if quiet:
        print(json.dumps({"recommended": plans[0], "all": plans}, indent=2))
    else:
        print("\nrecommended:\n" + planner.table(plans[0]))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main, command.config_parser(_CONFIG))
