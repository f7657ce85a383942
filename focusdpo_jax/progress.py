"""Progress of long loops, in the log or as a bar on a terminal."""

import math
import sys
import time

from absl import logging
from tqdm import tqdm

_EVERY = 10.0  # Seconds between two lines of `ItemProgress`.


class ItemProgress:
    """Logs every ten seconds how many of a number of items are done, and about how long the rest takes.

    What takes less than ten seconds logs nothing.
    """

    def __init__(self, what, total):
        """`what` names the items that are counted, `total` is how many there will be."""
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


class StepProgress:
    """Speed and progress of training steps: a bar on a terminal, a line in the log elsewhere.

    As `clu.periodic_actions.ReportProgress`, but of steps that have finished: that one counts steps when they
    are dispatched. Called when a logging window is reported, with the work of the window.
    """

    def __init__(self, *, start, total, unit, per_step, devices=1, peak=None):
        """A loop of the steps from start to total.

        Args:
          unit, per_step: what a step is made of (pairs, images), and how many of them.
          devices: over which a step is divided.
          peak: floating-point operations a second of a device at its best
            (`profiling.peak_flops.matmul_peak`).
        """
        self._total, self._unit, self._per_step = total, unit, per_step
        self._devices, self._peak = devices, peak
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self._shown, self._time = start, time.monotonic()

    def show(self, step, values, matmul_flops=0.0):
        """Reports that `step` steps are done, with a few scalars.

        Args:
          matmul_flops: floating-point operations of all matrix products since the last report.

        Returns:
          {"pairs_per_second": units a second, "teraflops_per_device": 10^12 operations a second,
          "utilisation": share of the peak}; the last two where there is a peak.
        """
        now = time.monotonic()
        window = max(now - self._time, 1e-9)
        seconds = window / max(step - self._shown, 1)
        rate = self._per_step / seconds
        speed, line = {f"{self._unit}_per_second": rate}, f"{rate:.1f} {self._unit}/s"
        if self._peak:
            flops = matmul_flops / window / self._devices
            speed |= {"teraflops_per_device": flops / 1e12, "utilisation": flops / self._peak}
            line += f"  {flops / 1e12:.3g} TFLOP/s a device, {flops / self._peak:.0%} of its best"
        scalars = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar:
            self._bar.update(step - self._shown)
            self._bar.set_postfix_str(f"{scalars}  {line}")
        else:
            logging.info(
                "step %d/%d  %s  %s  %s left",
                step,
                self._total,
                scalars,
                line,
                duration((self._total - step) * seconds),
            )
        self._shown, self._time = step, now
        return speed

    def pause(self):
        """Starts the clock again after work that is not part of the loop."""
        self._time = time.monotonic()

    def close(self):
        """Leaves the bar as it is."""
        if self._bar:
            self._bar.close()


def duration(seconds):
    """Seconds as people read them: "41 s", "3 min 20 s", "2 h 05 min"."""
    seconds = int(math.ceil(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
