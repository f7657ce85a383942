"""Accumulates the metrics of steps on the device over a logging window, and reports their means.

A window is reported while the step after it runs, so that logging does not stall the device.
"""

import numpy as np
from absl import logging

from focusdpo_jax.errors import UserError
from focusdpo_jax.training.metrics import mean_by_bucket, merge

# Metrics in the log line of a window.
_SHOWN = ("loss", "implicit_accuracy")


class Windows:
    """The consecutive logging windows of a run."""

    def __init__(self, writer, progress, checkpoints, buckets=(), accumulate=1):
        """Initialises it.

        Args:
          writer: `MetricWriter` of the means.
          progress: `StepProgress` that shows the log line.
          checkpoints: `Checkpoints`, closed if a metric is not finite.
          buckets: names of the run's buckets. With several, their means are reported, too; the logit
            scale of each is logged once.
          accumulate: microsteps per optimiser step. If > 1, the microsteps of a step have different
            buckets, and the gradient norm is not reported per bucket.
        """
        self._writer, self._progress, self._checkpoints = writer, progress, checkpoints
        self._of_whole_steps = ("gradient_norm",) if accumulate > 1 else ()
        self._ended = None
        self._scales = dict.fromkeys(buckets)
        self._several = len(self._scales) > 1
        self._begin()

    def _begin(self):
        self._sums, self._matmul_flops = {}, 0.0

    def add(self, bucket, metrics, matmul_flops):
        """Adds a batch.

        Args:
          bucket: name of its bucket.
          metrics: the `StepMetrics` of a `Step`, on the device. Metrics that the bucket's structure
            disables are missing, and are averaged over the other buckets.
          matmul_flops: floating-point operations of its matrix products.
        """
        total = self._sums.get(bucket)
        self._sums[bucket] = metrics if total is None else merge(total, metrics)
        self._matmul_flops += matmul_flops

    def end(self, number):
        """Ends the window with step `number`; the next `report` reports it."""
        self._ended = number, self._sums, self._matmul_flops
        self._begin()

    def report(self):
        """Reports the last ended window, if it is not reported yet; waits for its last step.

        Raises:
          UserError: a metric is not finite.
        """
        if self._ended is None:
            return
        number, sums, matmul_flops = self._ended
        self._ended = None
        values = mean_by_bucket(sums, self._of_whole_steps, self._several)
        require_finite(values, number, self._checkpoints)
        self._log_scales(number, values)
        shown = {name: values[name] for name in _SHOWN if name in values}
        speed = self._progress.show(number, shown, matmul_flops)
        self._writer.write_scalars(number, values | speed)

    def _log_scales(self, number, values):
        """Logs each bucket's mean logit scale (`focus.losses.diffusion_dpo`) once."""
        if not self._scales or "logit_scale" not in values:
            return
        for bucket, scale in self._scales.items():
            if scale is None:
                single = values["logit_scale"] if len(self._scales) == 1 else None
                self._scales[bucket] = values.get(f"{bucket}/logit_scale", single)
        if None not in self._scales.values():
            logging.info(
                "logit scale (mean of |beta / 2 margin|) of the first %d steps: %s",
                number,
                ", ".join(f"{bucket} {scale:.2g}" for bucket, scale in self._scales.items()),
            )
            self._scales = {}


def require_finite(values, step, checkpoints):
    """Raises a UserError if a metric is not finite, before a checkpoint of that state is saved.

    Args:
      values: {name: float}.
      step: step of the metrics, for the message.
      checkpoints: the run's `Checkpoints`, which are closed before the error is raised.
    """
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        saved = (
            f"The checkpoint of step {checkpoints.latest} is intact"
            if checkpoints.latest
            else "No checkpoint had been written yet"
        )
        checkpoints.close()
        raise UserError(
            f"{bad[0]} = {values[bad[0]]} at step {step}. {saved}; "
            "resume from it with a lower config.learning_rate or config.beta."
        )
