"""From a source of records to batches: shuffled, sharded by process, resumable; through grain.

The order is that of one global stream, determined by the seed alone. Of every batch of it process p of
P takes the p-th of P equal parts, so that a step's global batch is the same on any number of processes.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from focusdpo_jax import interrupts
from focusdpo_jax.data.record import PreferenceBatch, Tokenize, check_record, encode
from focusdpo_jax.errors import UserError

if TYPE_CHECKING:
    import grain


def make_loader(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
    batch_transform: Callable[[Any], Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    epochs: int | None = None,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> "Batches":
    """An iterator over training batches.

    Every epoch has an order of its own. Batches run on across the ends of epochs; only after the last
    of a finite number of epochs are leftovers dropped. The batches are the same whoever reads them,
    threads or any number of processes.

    Args:
      source: entries by position (`__len__` and `__getitem__`, called from several threads). Where
        there are worker processes, each gets a pickled copy, and one of `transform`.
      batch_size: pairs a step over all processes; this one yields its share of it.
      seed: determines the order.
      transform: from an entry to a pytree of arrays of fixed shapes, which are stacked to batches; for
        preference records, `pair_transform`. None where the entries are trees already.
      batch_transform: from such a batch to the one that is given, where that is not the same.
      process_index, process_count: which part of every batch this process reads.
      shuffle: False keeps the order of the source.
      epochs: passes over the source; None goes on for ever.
      workers: processes that read; 0 reads in this one, by threads.
      threads: how many of them, in this process alone: a worker has one. 0 reads a batch when it is
        asked for, without any.
      prefetch: how many batches threads, or each worker, read ahead.

    Raises:
      UserError: the sizes do not fit together; while iterating, a record is corrupt or unfit, or a
        worker has died.
    """
    # Slow to import, so only where batches are read: planning, sampling and benchmarks have none.
    import grain

    from focusdpo_jax.data import order

    local_size = _local_size(batch_size, process_count)
    if not len(source):
        raise UserError("the data set is empty; build it with at least one record")
    dataset = grain.MapDataset.source(source).repeat(epochs)
    if shuffle:
        dataset = order.Shuffled(dataset, len(source), seed)
    if process_count > 1:
        dataset = order.Share(dataset, batch_size, local_size, process_index)
    if transform is not None:
        dataset = dataset.map(transform)
    dataset = dataset.batch(local_size, drop_remainder=True)
    if batch_transform is not None:
        dataset = dataset.map(batch_transform)
    return Batches(
        dataset,
        workers,
        grain.ReadOptions(num_threads=1 if workers else threads, prefetch_buffer_size=prefetch),
    )


class Batches:
    """Batches of a data set in order; their position is all the state there is.

    Nothing is read, and no process started, before the first batch is asked for.
    """

    def __init__(self, dataset: "grain.MapDataset", workers: int, options: "grain.ReadOptions"):
        """Of a data set of batches; see `make_loader` for the rest."""
        self._dataset, self._workers, self._options = dataset, workers, options
        self._given, self._iterator = 0, None

    def __iter__(self):
        return self

    def __next__(self):
        try:
            if self._iterator is None:
                with interrupts.children_without_sigint():
                    self._iterator = self._open()
                    batch = next(self._iterator)
            else:
                batch = next(self._iterator)
        except RuntimeError as error:
            if "Worker process" not in str(error):
                raise
            raise UserError(
                f"a process that reads data has died ({error}), perhaps for want of memory or of "
                f"room in /dev/shm; give fewer than config.data.workers = {self._workers}"
            ) from error
        self._given += 1
        return batch

    def get_state(self) -> dict:
        """What `set_state` needs to go on behind the last batch, as JSON values."""
        return {"next_index": self._given}

    def set_state(self, state: dict) -> None:
        """Goes on where another iterator of the same data set was, with any number of workers."""
        self.close()
        self._given = state["next_index"]

    def close(self) -> None:
        """Ends worker processes, until another batch is asked for."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _open(self):
        rest = self._dataset.slice(slice(self._given, None)).to_iter_dataset(self._options)
        if self._workers:
            import grain

            if not flags.FLAGS.is_parsed():  # Grain looks at its own, also without a command line.
                flags.FLAGS.mark_as_parsed()
            rest = rest.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, self._options.prefetch_buffer_size),
                worker_init_fn=_start_worker,
            )
        return iter(rest)


def _start_worker(index: int, count: int) -> None:
    """Leaves accelerators and signals to the process that trains, and the cores to other workers."""
    import cv2

    del index, count
    jax.config.update("jax_platforms", "cpu")
    for number in (signal.SIGINT, signal.SIGTERM):  # Many are sent to all processes of a run.
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Grain's workers would wait for ever for one that was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


class Prefetcher:
    """Batches as a step takes them, each made while the step before it runs.

    Attributes:
      batch: the one that is to be trained on now.
      state: of the loader, before that batch.
    """

    def __init__(self, batches: Batches, prepare: Callable[[Any], Any]):
        """Takes a loader, and what brings its batches to the device without waiting for it."""
        self._batches, self._prepare = batches, prepare
        self.advance()

    def advance(self) -> None:
        """Goes on to the next batch; to be called when the step with this one has been started."""
        self.state = self._batches.get_state()
        self.batch = self._prepare(next(self._batches))


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
        return PreferenceBatch(
            **encode(
                record, tokenize=tokenize, num_subjects=num_subjects, reference_size=reference_size
            )
        )

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
