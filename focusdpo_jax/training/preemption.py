"""Saves and ends a run at SIGTERM, which schedulers send before preemption, or at Ctrl-C.

A run finishes its step, saves, and exits. A second Ctrl-C exits at once; a second SIGTERM has no
effect, since schedulers send several.
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
      status: exit status, 143 or 130, as a shell reports a process that the signal ended.
        Schedulers start such a run again.
    """

    def __init__(self, number, step, total):
        """Initialises it with the signal's number, received in step `step` of `total`."""
        super().__init__(
            f"stopped by {_NAMES.get(number, number)} after step {step} of {total}, which is "
            "saved; run the same command again to resume"
        )
        self.status = 128 + number


@contextlib.contextmanager
def watch():
    """Records SIGTERM and the first Ctrl-C instead of ending the process.

    Yields:
      preempted(step) -> the number of the signal if the run has to save and exit after this step,
      or 0. Call it after every step. With several processes, all get the signal at the same step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0  # Python delivers signals only to the main thread.
        return
    received = []

    def record(number, frame):
        if number == signal.SIGINT:
            if number in received:
                raise KeyboardInterrupt
            logging.info("Ctrl-C: saving after this step; press it again to exit at once")
        received.append(number)

    def record_and_forward(number, frame):
        record(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)  # jax forwards it to the other processes.

    def preempted_everywhere(step):
        return (
            multihost_utils.reached_preemption_sync_point(step)
            and (received or [signal.SIGTERM])[0]
        )

    # The signal reaches one process; jax notifies the others and chooses a common step.
    several = jax.process_count() > 1
    handlers = (
        {signal.SIGINT: record_and_forward}
        if several
        else {signal.SIGINT: record, signal.SIGTERM: record}
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield preempted_everywhere if several else lambda step: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
