"""The numbers of a run's steps: added up on the device over a logging window, and then reported.

Nobody waits for a window's last step: it is reported while the step after it runs.
"""

import numpy as np
from absl import logging

from focusdpo_jax.errors import UserError
from focusdpo_jax.training.metrics import mean_by_bucket, merge

# Of a window's means, what the log's line shows.
_SHOWN = ("loss", "implicit_accuracy")


class Windows:
    """The logging windows of a run, one after the other."""

    def __init__(self, writer, progress, checkpoints, buckets=(), accumulate=1):
        """Takes where a report goes (`MetricWriter`, `StepProgress`) and what is there to go back to.

        Args:
          buckets: names of those whose logit scale is logged once all of them were seen.
          accumulate: microsteps of an optimiser step. If there are several, each in a bucket of its
            own, the norm of the gradient is that of no bucket.
        """
        self._writer, self._progress, self._checkpoints = writer, progress, checkpoints
        self._of_whole_steps = ("gradient_norm",) if accumulate > 1 else ()
        self._ended = None
        self._scales = dict.fromkeys(buckets)
        self._begin()

    def _begin(self):
        self._seen, self._matmul_flops = {}, 0.0

    def add(self, bucket, metrics, matmul_flops):
        """Adds a batch.

        Args:
          bucket: its name.
          metrics: the `StepMetrics` of a `Step`, on the device; what the bucket's structure switches off
            is missing, and will be averaged over the other buckets.
          matmul_flops: floating-point operations of its matrix products.
        """
        seen = self._seen.get(bucket)
        self._seen[bucket] = metrics if seen is None else merge(seen, metrics)
        self._matmul_flops += matmul_flops

    def end(self, number):
        """Ends the window with step `number`; `report` will report it."""
        self._ended = number, self._seen, self._matmul_flops
        self._begin()

    def report(self):
        """Reports the window that has ended, once; waits for its last step.

        Raises:
          UserError: a number is no longer finite.
        """
        if self._ended is None:
            return
        number, seen, matmul_flops = self._ended
        self._ended = None
        values = mean_by_bucket(seen, self._of_whole_steps)
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
    """Stops a run whose numbers are no longer finite, before anything of it is saved."""
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        saved = (
            f"The checkpoint of step {checkpoints.latest} is intact"
            if checkpoints.latest
            else "No checkpoint had been written yet"
        )
        checkpoints.close()
        raise UserError(
            f"{wrong[0]} = {values[wrong[0]]} at step {step}. {saved}; "
            "go on from it with a lower config.learning_rate or config.beta."
        )
