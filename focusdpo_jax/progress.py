"""Reports the progress of long loops in the log or as a bar on a terminal."""

import math
import sys
import time

from absl import logging
from tqdm import tqdm

_EVERY = 10.0  # Seconds between two lines of `ItemProgress`.


class ItemProgress:
    """Logs the number of finished items and the estimated remaining time, every ten seconds.

    Loops of less than ten seconds log nothing.
    """

    def __init__(self, what, total):
        """Starts the clock.

        Args:
          what: description of the counted items, for the log line.
          total: total number of items.
        """
        self._what, self._total, self._done = what, total, 0
        self._start = self._shown = time.monotonic()

    def add(self, count):
        """Counts `count` more items as finished."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= _EVERY or self._done == self._total and now - self._start >= _EVERY:
            rate = self._done / (now - self._start)
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
    """Reports speed and progress of training steps: as a bar on a terminal, otherwise in the log.

    Unlike `clu.periodic_actions.ReportProgress`, which counts steps when they are dispatched, it
    counts finished steps. It is called when a logging window is reported.
    """

    def __init__(self, *, start, total, unit, per_step, devices=1, peak=None):
        """Starts the clock, and the bar if there is one.

        Args:
          start: number of steps done before.
          total: last step.
          unit: name of the items of a step ("pairs", "images").
          per_step: items per step.
          devices: number of devices that share a step.
          peak: peak floating-point operations per second of a device
            (`profiling.peak_flops.matmul_peak`), or None if unknown.
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
          step: number of finished steps.
          values: scalars to show, {name: float}.
          matmul_flops: floating-point operations of all matrix products since the last report.

        Returns:
          {"pairs_per_second": items per second, "teraflops_per_device": 10^12 operations per
          second, "utilisation": share of the peak}; the last two only if the peak is known.
        """
        now = time.monotonic()
        window = max(now - self._time, 1e-9)
        seconds = window / max(step - self._shown, 1)
        rate = self._per_step / seconds
        speed, line = {f"{self._unit}_per_second": rate}, f"{rate:.1f} {self._unit}/s"
        if self._peak:
            flops = matmul_flops / window / self._devices
            speed |= {"teraflops_per_device": flops / 1e12, "utilisation": flops / self._peak}
            line += f"  {flops / 1e12:.3g} TFLOP/s per device, {flops / self._peak:.0%} of peak"
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
        """Restarts the clock after work that is not part of the loop."""
        self._time = time.monotonic()

    def close(self):
        """Closes the bar, which stays visible."""
        if self._bar:
            self._bar.close()


def duration(seconds):
    """Formats seconds as "41 s", "3 min 20 s" or "2 h 05 min"."""
    seconds = int(math.ceil(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
