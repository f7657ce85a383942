"""Checkpoints of a run's state and loader position, written by Orbax in the background.

A checkpoint gets its final name only when it is complete, so that a killed process leaves either a
complete checkpoint or none.
"""

import contextlib

import jax
import orbax.checkpoint as ocp
from etils import epath

from focusdpo_jax.checkpoints import run_folder
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import no_room
from focusdpo_jax.sharding import processes


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`."""

    def __init__(self, workdir, *, keep=None, read_only=False):
        """Opens the folder.

        Args:
          workdir: folder of the run.
          keep: number of newest checkpoints to keep; None keeps all.
          read_only: whether to change nothing, so that the run may be training meanwhile.
        """
        self.folder = epath.Path(workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)

    @property
    def latest(self):
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step, state, loader_state):
        """Starts writing a checkpoint; training continues while the files are written.

        Args:
          step: step of the state, which names the checkpoint.
          state: a pytree of arrays.
          loader_state: result of the loader's `get_state`, JSON-serialisable.
        """
        with self._written():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), loader=ocp.args.JsonSave(loader_state)
                ),
            )

    def restore(self, example, *, release=False):
        """Reads the newest checkpoint.

        Args:
          example: a state of the same structure; the result has its shapes, types and shardings.
          release: whether to delete the example's arrays first, so that only one state is in
            memory.

        Returns:
          (state, loader_state).

        Raises:
          UserError: the files do not fit the example or cannot be read.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, example)
        if release:
            for array in jax.tree.leaves(example):
                array.delete()
        step = self.latest
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), loader=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot restore checkpoint {step} of {self.folder}: {reason}. Remove the folder "
                f"{self.folder / str(step)} to go back to an earlier one."
            ) from error
        return restored.state, restored.loader

    def close(self):
        """Waits until all checkpoints are written."""
        with self._written():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _written(self):
        """Raises a UserError if this or the previous checkpoint cannot be written; removes it.

        Orbax writes in the background and raises errors at the next call, some of them as errors of
        the library that writes the arrays.
        """
        try:
            yield
        except Exception as error:
            reason = no_room(error)
            if reason is None and not isinstance(error, OSError):
                raise
            last = run_folder.newest_checkpoint(self.folder.parent)
            if processes.is_first():
                for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    path.rmtree(missing_ok=True)
            raise UserError(
                f"cannot write a checkpoint in {self.folder} ({reason or error}). "
                + (
                    "There is no complete one yet"
                    if last is None
                    else f"The last complete one is of step {last}"
                )
                + "; make room and run the same command again"
            ) from error
