"""What the loop trains: a value with functions, not a class to inherit from."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Parameters, a loss over batches, and what to do with the result.

    Attributes:
      trainable: initial parameters under training, a nested dict.
      frozen: everything else that the loss reads, a pytree.
      guide: (structure, frozen, batch, params, key) -> (guidance, dict of scalars), all that the
        loss needs and that carries no gradient; `structure` is static and decides what is compiled.
      loss: (trainable, frozen, batch, guidance, params, key) -> (loss, dict of scalars).
      buckets: {name: (structure, params)}: buckets of equal structure share one executable.
      bucket_at: batch number -> name of its bucket, the same on every host.
      example: () -> batch of the loss, as shapes with shardings: the step is compiled from it while
        the data is made ready.
      open_batches: () -> `batches`; called once, it makes the data ready.
      prepare: batch of the iterator -> batch of the loss, on the device.
      unit: what a batch is made of, for the progress bar ("pairs").
      start: called once before the first step with a MetricWriter.
      sample: called every `config.sample_every` steps with (step, trainable, MetricWriter).
      finish: called at the end with (step, trainable, MetricWriter).
      mesh: on which parameters and batches lie.
    """

    trainable: dict
    frozen: Any
    guide: Callable
    loss: Callable
    buckets: Mapping[str, tuple[Hashable, Any]]
    bucket_at: Callable[[int], str]
    example: Callable
    open_batches: Callable
    prepare: Callable
    unit: str
    start: Callable
    sample: Callable
    finish: Callable
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def batches(self):
        """A `loader.Batches`."""
        return self.open_batches()
