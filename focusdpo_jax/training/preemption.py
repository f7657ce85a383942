"""Saves and ends a run at SIGTERM, as schedulers send before preemption, or at Ctrl-C.

A run finishes its step, saves, and exits. A second Ctrl-C exits at once; a second SIGTERM has no effect, since
schedulers send several.
"""

import contextlib
import os
import signal
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Preempted(Exception):
    """A run has received SIGTERM or Ctrl-C, and has saved its state.

    Attributes:
      status: exit status, 143 or 130, as a shell reports a process that the signal ended. Schedulers
        start such a run again.
    """

    def __init__(self, number, step, total):
        """Takes the signal's number, received in step `step` of `total`."""
        super().__init__(
            f"asked to leave ({_NAMES.get(number, number)}) after step {step} of {total}, which "
            "is saved; the same command goes on from there"
        )
        self.status = 128 + number


@contextlib.contextmanager
def watch():
    """Records SIGTERM and the first Ctrl-C instead of ending the process.

    Yields:
      asked(step) -> the number of the signal if the run has to save and exit after this step, or 0. Call it
      after every step. With several processes, all get the signal at the same step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0  # Python delivers signals to the main thread alone.
        return
    noted = []

    def note(number, frame):
        if number == signal.SIGINT:
            if number in noted:
                raise KeyboardInterrupt
            logging.info("Ctrl-C: saving after this step; once more to leave at once")
        noted.append(number)

    def note_for_all(number, frame):
        note(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)  # jax forwards it to the other processes.

    def asked_of_all(step):
        return (
            multihost_utils.reached_preemption_sync_point(step) and (noted or [signal.SIGTERM])[0]
        )

    # The signal reaches one process; jax notifies the others and chooses a common step.
    several = jax.process_count() > 1
    handlers = (
        {signal.SIGINT: note_for_all} if several else {signal.SIGINT: note, signal.SIGTERM: note}
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked_of_all if several else lambda step: noted[0] if noted else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
