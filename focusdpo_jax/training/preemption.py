"""Saves and ends a run at SIGTERM, as schedulers send before preemption, or at Ctrl-C.

A run saves after the step that it is in, and leaves. A second Ctrl-C does not wait for that; a second
SIGTERM changes nothing, since schedulers send several.
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
      status: exit status, what a shell reports of a process that the signal has ended: 143 or 130.
        Schedulers start such a run again.
    """

    def __init__(self, number, step, total):
        """Of a signal's number, noted in step `step` of `total`."""
        super().__init__(
            f"asked to leave ({_NAMES.get(number, number)}) after step {step} of {total}, which "
            "is saved; the same command goes on from there"
        )
        self.status = 128 + number


@contextlib.contextmanager
def watch():
    """While it is open, SIGTERM and the first Ctrl-C are noted and not obeyed.

    Yields:
      asked(step) -> the number of the signal, if the run is to save and leave after this step, or 0; to be
      called after every step. Of several processes all get an answer for the same step, which none of them
      has passed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0  # Python gives signals to the main thread alone.
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
