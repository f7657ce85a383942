"""Reads the folder of a run: its configuration, its metrics and its newest weights."""

import json
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from focusdpo_jax.checkpoints import model_folder
from focusdpo_jax.errors import UserError


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads the configuration in a run's `config.json`.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: no run there (its config.json cannot be read: "
            f"{error.strerror or error}). Give the folder of a run of focusdpo_jax.main, or "
            "another value that --help lists."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from error


class Weights(NamedTuple):
    """The location of a run's weights.

    Attributes:
      folder: the run's `model/`, or None if the weights are in the checkpoint of `step`.
      step: step at which they were saved; None if an older version of the package did not record
        it.
    """

    folder: epath.Path | None
    step: int | None


def newest_weights(workdir: epath.PathLike) -> Weights:
    """Finds the newest weights of a run, which may be finished, running, resumed or stopped.

    `model/` is written at the end from the state of the newest checkpoint. So it has the newest
    weights unless the run was resumed afterwards, or is writing it now.

    Raises:
      UserError: the run has neither a complete `model/` nor a checkpoint yet.
    """
    workdir = epath.Path(workdir)
    checkpoint, folder, step = newest_checkpoint(workdir), workdir / "model", None
    try:
        step = model_folder.load_step(folder)
    except (OSError, ValueError):  # Not finished, or interrupted while it was written.
        folder = None
    if checkpoint is None and folder is None:
        config = read_config(workdir)
        first = min(config.get("checkpoint_every") or config["steps"], config["steps"])
        raise UserError(
            f"--workdir={workdir}: the run has no checkpoint yet (the first is written at step "
            f"{first}), and the run is not finished (it has no model/ yet). Run the training's "
            "command again to resume it."
        )
    if checkpoint is None:
        return Weights(folder, step)
    if folder is None or not _reaches(workdir, step, checkpoint):
        return Weights(None, checkpoint)
    return Weights(folder, checkpoint if step is None else step)


def _reaches(workdir: epath.Path, step: int | None, checkpoint: int) -> bool:
    """Returns whether `model/`, of a given or unknown step, is as new as a checkpoint."""
    if step is not None:
        return step >= checkpoint
    # Without a recorded step: a run that stopped before its last step has not written a newer
    # model, and one that was killed just before writing it has an older file.
    if checkpoint < read_config(workdir)["steps"]:
        return False
    written = workdir / "checkpoints" / str(checkpoint) / "_CHECKPOINT_METADATA"
    return not written.exists() or (
        (workdir / "model" / "model.json").stat().mtime >= written.stat().mtime
    )


def newest_checkpoint(workdir: epath.PathLike) -> int | None:
    """Returns the step of a run's newest complete checkpoint, or None."""
    folder = epath.Path(workdir) / "checkpoints"
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None


def drop_later_model(workdir: epath.PathLike, step: int) -> bool:
    """Invalidates a `model/` that is newer than the step from which a run resumes.

    This happens if checkpoints were removed to go back or to start again. The new checkpoints would
    seem older than this `model/`, until the run writes it again at its end.

    Args:
      workdir: folder of the run.
      step: step from which the run resumes; 0 for a start from the beginning.

    Returns:
      Whether there was such a `model/`.
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


def last_metrics(workdir: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """Returns {name: last value} of the metrics of a run; empty if nothing was logged.

    Args:
      workdir: folder of the run.
      step: lines of later steps are ignored; None reads all lines.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    values: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                logged = json.loads(line)
            except ValueError:
                continue  # The run was stopped while it wrote this line.
            if step is None or logged["step"] <= step:
                values |= logged
    return values
