"""From a source of records to batches: shuffled, sharded by process, resumable; through grain.

The order is that of one global stream, determined by the seed alone. Of every batch of it process p of
P takes the p-th of P equal parts, so that a step's global batch is the same on any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from focusdpo_jax.data.record import PreferenceBatch, Tokenize, check_record, encode
from focusdpo_jax.errors import UserError


def make_loader(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    transform: Callable[[Any], Any],
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    epochs: int | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """An iterator over training batches.

    Every epoch has an order of its own. Batches run on across the ends of epochs; only after the last
    of a finite number of epochs are leftovers dropped. `get_state()` gives a dict that JSON can hold,
    and after `set_state` the iterator goes on exactly where the other one was, batches already
    prefetched included.

    Args:
      source: entries by position (`__len__` and `__getitem__`, called from several threads).
      batch_size: pairs a step over all processes; this one yields its share of it.
      seed: determines the order.
      transform: from an entry to a pytree of arrays of fixed shapes, which are stacked to batches; for
        preference records, `pair_transform`.
      process_index, process_count: which part of every batch this process reads.
      shuffle: False keeps the order of the source.
      epochs: passes over the source; None goes on for ever.
      threads, prefetch: how many threads read, and how many batches they read ahead.

    Raises:
      UserError: the sizes do not fit together; while iterating, a record is corrupt or unfit.
    """
    local_size = _local_size(batch_size, process_count)
    if not len(source):
        raise UserError("the data set is empty; build it with at least one record")
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.repeat(epochs)
    if process_count > 1:
        dataset = _Share(dataset, batch_size, local_size, process_index)
    dataset = dataset.map(transform)
    dataset = dataset.batch(local_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))


class _Share(grain.MapDataset):
    """The part of every batch of a stream that one process reads."""

    def __init__(self, stream, batch_size, local_size, index):
        super().__init__(stream)
        self._batch_size, self._local_size, self._index = batch_size, local_size, index

    def __len__(self):
        return len(self._parent) // self._batch_size * self._local_size

    def __getitem__(self, position):
        batch, row = divmod(position, self._local_size)
        return self._parent[batch * self._batch_size + self._index * self._local_size + row]


def pair_transform(
    *, tokenize: Tokenize, num_subjects: int, reference_size: int | None = None
) -> Callable[[dict], PreferenceBatch]:
    """From a record to one example, a `PreferenceBatch` without the batch axis.

    Args:
      tokenize: from a caption to token ids, int32 [text encoders, length].
      num_subjects: slots a batch has (S); a record with more subjects is an error.
      reference_size: side of the references in a batch (R), the image encoder's; None keeps theirs.
    """

    def transform(record: dict) -> PreferenceBatch:
        check_record(record, max_subjects=num_subjects)
        return PreferenceBatch(**encode(record, tokenize=tokenize, num_subjects=num_subjects,
                                        reference_size=reference_size))

    return transform


def evaluation_batches(
    source: Sequence[dict],
    *,
    batch_size: int,
    transform: Callable[[dict], PreferenceBatch],
) -> Iterator[PreferenceBatch]:
    """One pass in the order of the source, in full batches of one shape.

    The last batch is filled up with copies of the last record, whose `index` is -1: leave those rows
    out. Every process yields whole batches. `transform` is as `pair_transform` makes it.
    """
    last = len(source) - 1
    for start in range(0, len(source), batch_size):
        examples = []
        for position in range(start, start + batch_size):
            example = transform(source[min(position, last)])
            if position > last:
                example = example.replace(index=np.int64(-1))
            examples.append(example)
        yield jax.tree.map(lambda *rows: np.stack(rows), *examples)


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size} and there are {process_count} processes; "
            "make it a positive multiple of their number"
        )
    return batch_size // process_count
