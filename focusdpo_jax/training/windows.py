"""The numbers of a run's steps: merged on the device over a logging window, and then reported.

Nobody waits for a window's last step: it is reported while the step after it runs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.errors import UserError

# Of a window's means, what the log's line shows.
_SHOWN = ("loss", "implicit_accuracy")


class Windows:
    """The logging windows of a run, one after the other."""

    def __init__(self, writer, progress, checkpoints):
        """Takes where a report goes (`MetricWriter`, `Progress`) and what is there to go back to."""
        self._writer, self._progress, self._checkpoints = writer, progress, checkpoints
        self._ended = None
        self._begin()

    def _begin(self):
        self._seen, self._products = {}, 0.0

    def add(self, bucket, metrics, products):
        """Adds a batch.

        Args:
          bucket: its name.
          metrics: {name: clu metric}, on the device; what the bucket's structure switches off is
            missing, and will be averaged over the other buckets.
          products: floating-point operations of its matrix products.
        """
        merge_into(self._seen.setdefault(bucket, {}), metrics)
        self._products += products

    def end(self, number):
        """Ends the window with step `number`; `report` will report it."""
        total = {}
        for metrics in self._seen.values():
            merge_into(total, metrics)
        self._ended = number, total, self._seen, self._products
        self._begin()

    def report(self):
        """Reports the window that has ended, once; waits for its last step.

        Raises:
          UserError: a number is no longer finite.
        """
        if self._ended is None:
            return
        number, total, seen, products = self._ended
        self._ended = None
        values = means(total, seen)
        require_finite(values, number, self._checkpoints)
        shown = {name: values[name] for name in _SHOWN if name in values}
        self._writer.scalars(number, values | self._progress.show(number, shown, products))


def merge_into(total, metrics):
    """Merges {name: clu metric} into `total`, which may lack some of them."""
    seen = [name for name in metrics if name in total]
    more = _merged(*({name: tree[name] for name in seen} for tree in (total, metrics)))
    total.update({**metrics, **more})


@jax.jit  # One call to the device, not two a metric.
def _merged(total, metrics):
    return {name: total[name].merge(metric) for name, metric in metrics.items()}


def means(total, seen):
    """Means over all steps of a window and, with several buckets, over each bucket's.

    Args:
      total: {name: clu metric} of all steps.
      seen: {bucket: {name: clu metric}}.

    Returns:
      {name: float, "bucket/name": float}.
    """
    groups = {"": total}
    if len(seen) > 1:
        groups |= {f"{bucket}/": metrics for bucket, metrics in sorted(seen.items())}
    names = [prefix + name for prefix, metrics in groups.items() for name in sorted(metrics)]
    found = jax.device_get([_computed(metrics) for metrics in groups.values()])
    return dict(zip(names, np.concatenate(found).tolist(), strict=True))


@jax.jit  # One array to bring to the host, not two a metric.
def _computed(metrics):
    return jnp.stack([metrics[name].compute() for name in sorted(metrics)])


def require_finite(values, step, checkpoints):
    """Stops a run whose numbers are no longer finite, before anything of it is saved."""
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        saved = (f"The checkpoint of step {checkpoints.latest} is intact"
                 if checkpoints.latest else "No checkpoint had been written yet")
        checkpoints.close()
        raise UserError(f"{wrong[0]} = {values[wrong[0]]} at step {step}. {saved}; "
                        "go on from it with a lower config.learning_rate or config.beta.")
