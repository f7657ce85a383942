"""A profiler's trace of a few training steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib

import jax
from absl import logging
from clu import profiler
from etils import epath

from focusdpo_jax.files import room_for
from focusdpo_jax.training.clu_without_tensorflow import periodic_actions

# Steps of a start before the trace: the first ones load programs and fill caches.
_SKIPPED = 2


class StepTrace(periodic_actions.Profile):
    """Traces `steps` whole steps, once, into `plugins/profile/` of the run folder.

    Waits for the device where the trace begins and ends, and nowhere else: steps are dispatched ahead, and
    the trace would otherwise have another number of them.
    """

    def __init__(self, workdir, steps, *, start, total):
        """The trace of a loop of the steps from start to total.

        Args:
          workdir: folder of the run.
          steps: how many are traced; fewer where the loop ends before.
        """
        self._begins = min(start + _SKIPPED, total - 1)
        self._ends = min(self._begins + steps, total)
        super().__init__(
            logdir=epath.Path(workdir),
            num_profile_steps=self._ends - self._begins,
            profile_duration_ms=None,
            first_profile=self._begins,
            every_secs=None,
        )

    def __call__(self, step, state):
        """Called before the first step and after each one.

        Args:
          step: number of steps that were dispatched.
          state: what the last one returns.
        """
        if step in (self._begins, self._ends):
            jax.block_until_ready(state)
            with room_for(self._logdir):
                super().__call__(step)

    def _end_session(self, url):
        super()._end_session(url)
        logging.info(
            "steps %d to %d are traced in %s/plugins/profile",
            self._begins + 1,
            self._ends,
            self._logdir,
        )

    def close(self):
        """Ends a trace that an error has cut off."""
        if self._session_running:
            self._session_running = False
            with contextlib.suppress(Exception):  # The error that has cut it off is on its way.
                profiler.stop()
