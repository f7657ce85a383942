"""The interface between the training loop and what it trains."""

import dataclasses
import functools
from collections.abc import Callable

from focusdpo_jax.training.step import StepDefinition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Parameters, a training step over batches, and callbacks of the loop.

    Attributes:
      trainable: initial trainable parameters, a nested dict.
      definition: the step's functions, buckets and frozen parameters.
      bucket_at: microstep -> name of its bucket, the same on every host.
      example: () -> batch of the loss, as shapes with shardings. The step is compiled from it while
        the data is built.
      open_batches: () -> `batches`; called once, and builds the data.
      prepare: batch of the iterator -> batch of the loss, on the devices.
      unit: name of the items of a batch, for the progress bar ("pairs").
      start: called once before the first step with a `clu.metric_writers.MetricWriter`.
      sample: called every `config.sample_every` steps with (step, trainable, `MetricWriter`).
      finish: called at the end with (step, trainable, `MetricWriter`).
    """

    trainable: dict
    definition: StepDefinition
    bucket_at: Callable[[int], str]
    example: Callable
    open_batches: Callable
    prepare: Callable
    unit: str
    start: Callable
    sample: Callable
    finish: Callable

    @functools.cached_property
    def batches(self):
        """The `loader.Batches`, opened at the first access."""
        return self.open_batches()
