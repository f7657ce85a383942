"""Profiles a few training steps for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib

import jax
from absl import logging
from clu import profiler
from etils import epath

from focusdpo_jax.files import room_for
from focusdpo_jax.training.clu_without_tensorflow import periodic_actions

# Steps before the trace, since the first ones load programs and fill caches.
_SKIPPED = 2


class StepTrace(periodic_actions.Profile):
    """Traces `steps` whole steps, once, into `plugins/profile/` of the run folder.

    Since steps are dispatched ahead, it waits for the device at the beginning and at the end of the
    trace, so that the trace contains exactly these steps.
    """

    def __init__(self, workdir, steps, *, start, total):
        """Initialises it.

        Args:
          workdir: folder of the run.
          steps: number of steps to trace; fewer if the loop ends before.
          start: number of steps done before the loop.
          total: last step of the loop.
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
        """Starts or stops the trace; call it before the first step and after each step.

        Args:
          step: number of dispatched steps.
          state: the state after the last step.
        """
        if step in (self._begins, self._ends):
            jax.block_until_ready(state)
            with room_for(self._logdir):
                super().__call__(step)

    def _end_session(self, url):
        super()._end_session(url)
        logging.info(
            "wrote a trace of steps %d to %d to %s/plugins/profile",
            self._begins + 1,
            self._ends,
            self._logdir,
        )

    def close(self):
        """Ends a trace that an error has interrupted."""
        if self._session_running:
            self._session_running = False
            with contextlib.suppress(Exception):  # The original error is being raised.
                profiler.stop()
