"""The training loop: trains the model of a configuration in a run folder.

`run` creates the task and its state, compiles the step, restores the newest checkpoint, and trains.
The loop trains a `Task`, which `builders.py` builds from the configuration.
"""

import contextlib
import gc
import json
import time

import jax
from absl import logging
from etils import epath

from focusdpo_jax import config as config_lib
from focusdpo_jax.checkpoints import run_folder
from focusdpo_jax.data.loader import Prefetcher
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import cannot_write, replace_file
from focusdpo_jax.profiling.peak_flops import matmul_peak
from focusdpo_jax.progress import StepProgress, duration
from focusdpo_jax.sharding import processes
from focusdpo_jax.training import builders, overview, preemption, preflight, run_lock
from focusdpo_jax.training.checkpointing import Checkpoints
from focusdpo_jax.training.state import create_state, make_optimizer
from focusdpo_jax.training.step import compile_beside
from focusdpo_jax.training.trace import StepTrace
from focusdpo_jax.training.windows import Windows
from focusdpo_jax.training.writers import import_wandb, open_writer


def run(config, workdir, *, accept_changes=False, profile_steps=0, wandb_project=None):
    """Trains a model, or resumes an earlier run in `workdir`.

    Args:
      config: a `config.RunConfig`.
      workdir: folder of the run; created if missing.
      accept_changes: whether to resume with a configuration other than the one that the run was
        started with.
      profile_steps: number of steps to profile; see `StepTrace`.
      wandb_project: Weights & Biases project that also receives scalars and images.

    Raises:
      Preempted: the process received a signal, and has saved a checkpoint.
      UserError: the configuration, the data or the machine is unsuitable, another process trains
        in the folder, or a metric is no longer finite. Earlier checkpoints are kept.
    """
    config_lib.check(config)
    workdir = epath.Path(workdir)
    if processes.is_first():
        require_same_run(workdir, config, accept_changes)
        run_lock.require_free(workdir)
        if wandb_project:
            import_wandb(wandb_project)
    preflight.check(config)
    with run_lock.held(workdir) as require_lock:
        if processes.is_first():
            open_workdir(workdir, config)
        processes.barrier("run folder")
        logging.info(
            "focusdpo_jax on %d x %s, run folder %s",
            jax.device_count(),
            jax.devices()[0].device_kind,
            workdir,
        )
        logging.info("%s", preflight.outline(config))
        _run(config, workdir, require_lock, profile_steps, wandb_project)


def _run(config, workdir, require_lock, profile_steps, wandb_project):
    """Trains after the checks of `run`, while it holds the lock of the folder."""
    task = builders.make_task(config, workdir)
    optimizer = make_optimizer(config)
    state = create_state(task.trainable, optimizer, config.ema_decay)
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    done = checkpoints.latest or 0
    with open_writer(
        workdir, start_step=done, wandb_project=wandb_project, config=config_lib.to_dict(config)
    ) as writer:
        if done < config.steps:
            if processes.is_first() and run_folder.drop_later_model(workdir, done):
                logging.warning(
                    "%s/model does not belong to the training that resumes at step %d; it was "
                    "invalidated and will be written again",
                    workdir,
                    done,
                )
            # The step compiles while the data is encoded and a checkpoint is read.
            with compile_beside(
                task.definition,
                optimizer,
                state,
                task.example(),
                seed=config.seed,
                accumulate=config.accumulate,
                ema_decay=config.ema_decay,
            ) as step:
                if processes.is_first():
                    overview.write(workdir, task.trainable, task.definition.frozen)
                task.start(writer)
                batches = task.batches
                if done:
                    # The initial state provides the shapes, and its memory is then released. The
                    # loader resumes after the last batch.
                    state, position = checkpoints.restore(state, release=True)
                    batches.set_state(position)
                    logging.info("resumed at step %d", done)
            trace = None
            if profile_steps and processes.is_first():
                trace = StepTrace(workdir, profile_steps, start=done, total=config.steps)
            state = train(
                config, task, state, step.result(), checkpoints, writer, done, require_lock, trace
            )
        else:
            task.start(writer)
            state, _ = checkpoints.restore(state, release=True)
        checkpoints.close()
        require_lock()
        # `config.steps` may have been reduced below the steps that are already done.
        task.finish(max(done, config.steps), state.evaluated, writer)
        # Barrier: exiting early would look like a crash to the other processes.
        processes.barrier("end")


def train(
    config, task, state, step, checkpoints, writer, done, require_lock=lambda: None, trace=None
):
    """Runs the steps after `done` up to `config.steps`, and returns the last state.

    Args:
      config: a `config.RunConfig`.
      task: a `Task` that has been started.
      state: the `TrainState` after step `done`.
      step: a compiled `Step`.
      checkpoints: a `Checkpoints`.
      writer: a `clu.metric_writers.MetricWriter`.
      done: steps that the state has made.
      require_lock: called before a checkpoint is written; raises if another process has taken
        the folder.
      trace: a `StepTrace`, or None.
    """
    definition, prefetcher = task.definition, Prefetcher(task.batches, task.prepare)
    stack = contextlib.ExitStack()
    preempted = stack.enter_context(preemption.watch())
    progress = StepProgress(
        start=done,
        total=config.steps,
        unit=task.unit,
        per_step=config.batch_size * config.accumulate,
        devices=definition.mesh.size,
        peak=matmul_peak(jax.local_devices()[0], config.dtype),
    )
    windows = Windows(writer, progress, checkpoints, definition.buckets, config.accumulate)
    start = time.monotonic()
    # Freeze long-lived objects, so that the garbage collector skips them.
    gc.collect()
    gc.freeze()
    try:
        if trace:
            trace(done, state)
        for number in range(done + 1, config.steps + 1):
            for microstep in range((number - 1) * config.accumulate, number * config.accumulate):
                bucket = task.bucket_at(microstep)
                structure, params = definition.buckets[bucket]
                state, metrics = step(
                    structure, state, definition.frozen, prefetcher.batch, params, microstep
                )
                prefetcher.advance()
                windows.add(bucket, metrics, step.matmul_flops[structure])
            if trace:
                trace(number, state)
            windows.report()  # The window that ended with the previous step, while this one runs.
            last, stop = number == config.steps, preempted(number)
            saves = stop or last or is_due(config.checkpoint_every, number)
            # A window ends at every checkpoint, so that a resumed run logs the same means.
            if saves or is_due(config.log_every, number):
                windows.end(number)
            if saves:
                windows.report()
                # A resumed run keeps the lines up to its checkpoint, so they are written first.
                writer.flush()
                require_lock()
                checkpoints.save(number, state, prefetcher.state)
            if stop:
                checkpoints.close()
                raise preemption.Preempted(stop, number, config.steps)
            if is_due(config.sample_every, number) and not last:
                windows.report()
                task.sample(number, state.evaluated, writer)
                progress.pause()
    finally:
        task.batches.close()
        progress.close()
        if trace:
            trace.close()
        stack.close()
        gc.unfreeze()
    logging.info("trained %d steps in %s", config.steps - done, duration(time.monotonic() - start))
    return state


def is_due(every, number):
    """Returns whether step `number` is a multiple of `every`; never if `every` is 0."""
    return every > 0 and number % every == 0


def require_same_run(workdir, config, accept_changes=False):
    """Checks that a run folder is new or belongs to a run of this configuration; writes nothing.

    Raises:
      UserError: it cannot be read, belongs to a run with another configuration, or its
        `config.json` is damaged.
    """
    try:
        # Without these files nothing in the folder depends on the configuration.
        kept = [workdir / "base.npz", *(workdir / "checkpoints").glob("*")]
        if not (workdir / "config.json").exists() or not any(file.exists() for file in kept):
            return
        changed = config_lib.changed_fields(
            run_folder.read_config(workdir), json.loads(config_lib.to_json(config))
        )
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error
    if changed and accept_changes:
        logging.warning("resuming with a changed %s", ", ".join(changed))
    elif changed:
        raise UserError(
            f"{workdir} holds a run with another {', '.join(changed)}. Give another "
            "--workdir, remove the folder to start again, or give --accept_changes to resume "
            "with the new values."
        )


def open_workdir(workdir, config):
    """Creates the run folder and its `config.json`.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        replace_file(workdir / "config.json", config_lib.to_json(config))
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error
