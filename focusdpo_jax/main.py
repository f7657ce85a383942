"""Trains a generator: `python -m focusdpo_jax.main --config=configs/toybox_dpo.py`.

Run the same command again to resume a stopped run. After SIGTERM it saves a checkpoint and exits
with status 143, after Ctrl-C with 130; a second Ctrl-C exits at once. The exit status is 2 for an
error of the user, and 3 if another process of the run was lost. Any field of the configuration can
be changed on the command line, for example `--config.beta=2000 --config.objective=dpo`.
"""

from absl import flags
from ml_collections import config_flags

from focusdpo_jax import command

FLAGS = flags.FLAGS
# From this number of pixels per step on, the buffers exceed the heap of a single thread.
_LARGE = 16 * 64**2
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, such as configs/toybox_dpo.py, or its name, toybox_dpo. Some take an "
    "argument after a colon: configs/toybox_base.py:probe. Override fields by "
    "--config.FIELD=VALUE.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: checkpoints, metrics.jsonl, TensorBoard events, samples, "
    "the trained model. Default: runs/<config name>. May be gs://.",
)
_ACCEPT = flags.DEFINE_bool(
    "accept_changes",
    False,
    "Resume a run although its configuration differs from the one that it was started with.",
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print every field of the configuration with its meaning, and exit."
)
_PROFILE = flags.DEFINE_integer(
    "profile_steps",
    0,
    "Profile this number of steps, from the third one on, and write the trace to "
    "plugins/profile/ of the run folder, for TensorBoard's profile plugin or Perfetto (0: none).",
    lower_bound=0,
)
_WANDB = flags.DEFINE_string(
    "wandb_project",
    None,
    "Also send scalars and images to this project of Weights & Biases (pip install wandb).",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For training with several processes: host and port of the first process, "
    "such as 10.0.0.2:1234. Not needed on a TPU pod, GKE or Slurm, where it is detected.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Number of processes that train together.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "Index of this process among them, from 0.", lower_bound=0
)


def main():
    """Reads the flags and runs `training.loop.run`."""
    # Imported after the flags are parsed, so that --help is fast.
    from focusdpo_jax.training import run_lock

    if _PRINT_CONFIG.value:
        from focusdpo_jax import config as config_lib

        print(config_lib.describe(config_lib.parse(_CONFIG.value)))
        return
    workdir = _WORKDIR.value or command.default_workdir(
        config_flags.get_config_filename(FLAGS["config"])
    )
    run_lock.require_free(workdir)  # Before imports that take seconds.
    from focusdpo_jax import config as config_lib
    from focusdpo_jax.sharding import processes
    from focusdpo_jax.training import loop, preemption

    config = config_lib.parse(_CONFIG.value)
    if config.batch_size * config.resolution**2 >= _LARGE:
        command.keep_memory()
    with processes.distributed(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value):
        try:
            loop.run(
                config,
                workdir,
                accept_changes=_ACCEPT.value,
                profile_steps=_PROFILE.value,
                wandb_project=_WANDB.value,
            )
        except preemption.Preempted as reason:
            command.leave(str(reason), reason.status)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main, command.config_parser(_CONFIG), resumable=True)
