"""Machines that are taken away with a warning: SIGTERM, which asks a run to save and leave."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils

# What a shell reports of a process that SIGTERM has ended; schedulers start such a run again.
EXIT_STATUS = 128 + signal.SIGTERM


class Preempted(Exception):
    """A run was asked to leave, and has saved what it had."""


@contextlib.contextmanager
def watch():
    """While it is open, SIGTERM is noted and not obeyed.

    Yields:
      reached(step) -> whether to save and leave after this step; to be asked after every step. Of
      several processes all get the same answer, for a step that none of them has passed.
    """
    if jax.process_count() > 1:
        # The signal reaches some process; jax tells the others, and agrees on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python gives signals to the main thread alone.
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
