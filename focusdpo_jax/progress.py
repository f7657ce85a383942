"""How far something long has come, in the log."""

import time

from absl import logging

_EVERY = 10.0  # Seconds between two lines.


class Progress:
    """Logs from time to time how much is done, and about how long the rest takes.

    What takes less than ten seconds logs nothing.
    """

    def __init__(self, what, total):
        """`what` names the things that are counted, `total` is how many there will be."""
        self._what, self._total, self._done = what, total, 0
        self._began = self._shown = time.monotonic()

    def add(self, count):
        """Counts `count` more as done."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= _EVERY or self._done == self._total and now - self._began >= _EVERY:
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            logging.info(
                "%s: %d of %d, %.3g/s, about %.0f s left",
                self._what,
                self._done,
                self._total,
                rate,
                left,
            )
            self._shown = now
