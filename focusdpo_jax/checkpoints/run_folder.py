"""What a run has written down about itself: its configuration, its metrics, where its newest weights lie."""

import json
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from focusdpo_jax.checkpoints import model_folder
from focusdpo_jax.errors import UserError


def read_config(workdir):
    """The configuration in a run's `config.json`, as a dict.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: no run there (its config.json cannot be read: "
            f"{error.strerror or error}). Give the folder of a run of focusdpo_jax.main, or what "
            "else --help says."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from error


class Weights(NamedTuple):
    """Where weights of a run lie.

    Attributes:
      folder: the run's `model/`; None where they lie in the checkpoint of `step`.
      step: after which they were saved; None where an older version of the package did not record it.
    """

    folder: epath.Path | None
    step: int | None


def newest_weights(workdir):
    """The newest weights of a run, whether it is finished, running, continued or stopped.

    `model/` is written at the end, from the state of the newest checkpoint. So it is the newest unless
    the run went on afterwards, or is writing it now.

    Returns:
      `Weights`.

    Raises:
      UserError: the run has neither a complete `model/` nor a checkpoint yet.
    """
    workdir = epath.Path(workdir)
    checkpoint, folder = newest_checkpoint(workdir), workdir / "model"
    try:
        step = model_folder.load_step(folder)
    except (OSError, ValueError):  # Not finished, or a writer was stopped.
        folder = None
    if checkpoint is None and folder is None:
        config = read_config(workdir)
        first = min(config.get("checkpoint_every") or config["steps"], config["steps"])
        raise UserError(
            f"--workdir={workdir}: the run has no checkpoint yet, whose first it writes at step "
            f"{first}, and the run is not finished (it has no model/ yet). Run the training's "
            "command again, which goes on where it stopped."
        )
    if checkpoint is None:
        return Weights(folder, step)
    if folder is None or not _reaches(workdir, step, checkpoint):
        return Weights(None, checkpoint)
    return Weights(folder, checkpoint if step is None else step)


def _reaches(workdir, step, checkpoint):
    """Whether `model/`, of a step or an unknown one, is as new as a checkpoint."""
    if step is not None:
        return step >= checkpoint
    # Where no step is recorded: a run that stopped before its end had no newer model to write, and one
    # that was killed just before that has an older file.
    if checkpoint < read_config(workdir)["steps"]:
        return False
    written = workdir / "checkpoints" / str(checkpoint) / "_CHECKPOINT_METADATA"
    return not written.exists() or (
        (workdir / "model" / "model.json").stat().mtime >= written.stat().mtime
    )


def newest_checkpoint(workdir):
    """The step of a run's newest complete checkpoint, or None."""
    folder = epath.Path(workdir) / "checkpoints"
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None


def drop_later_model(workdir, step):
    """Makes no model of a `model/` that is of another course of training than the one that goes on.

    That is so where somebody removed checkpoints in order to go back, or to start again: the run would
    later seem older than this `model/`, which it writes anew at its end.

    Args:
      step: from which the run goes on; 0 for a start from the beginning.

    Returns:
      Whether there was one.
    """
    folder = epath.Path(workdir) / "model"
    try:
        written = model_folder.load_step(folder)
    except (OSError, ValueError):
        return False
    if step and (written is None or written <= step):
        return False
    model_folder.begin(folder)
    return True


def last_metrics(workdir, step=None):
    """The last value of each metric of a run: {name: value}, empty where nothing was logged.

    Args:
      step: of the last line to look at; None looks at all.
    """
    path, values = epath.Path(workdir) / "metrics.jsonl", {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                logged = json.loads(line)
            except ValueError:
                continue  # A line that was being written when the run was stopped.
            if step is None or logged["step"] <= step:
                values |= logged
    return values
