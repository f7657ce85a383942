"""How far something long has come, in the log."""

import time

from absl import logging

_EVERY = 20.0  # Seconds between two lines.


class Progress:
    """A line in the log from time to time: how much is done, and about how long the rest takes."""

    def __init__(self, what, total):
        """`what` names the things that are counted, `total` is how many there will be."""
        self._what, self._total, self._done = what, total, 0
        self._began = self._shown = time.monotonic()

    def add(self, count):
        """`count` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= _EVERY or self._done == self._total:
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate
            logging.info("%s: %d of %d, %.2f/s, about %.0f s left", self._what, self._done,
                         self._total, rate, left)
            self._shown = now
