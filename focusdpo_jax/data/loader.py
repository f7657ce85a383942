"""Batches of training data: shuffled, sharded by process, resumable; built on Grain.

All processes share one global stream whose order depends on the seed alone. A process reads the
rows of every batch that its devices hold, so that a step's global batch is the same on any number
of processes.
"""

import dataclasses
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
from focusdpo_jax.data.record import PreferenceBatch, Source, Tokenize, check_record, encode
from focusdpo_jax.errors import UserError

if TYPE_CHECKING:
    import grain


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
    batch_transform: Callable[[Any], Any] | None = None,
    rows: Sequence[int] | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> "Batches":
    """Returns an iterator over training batches.

    Every epoch has its own order. Batches span the ends of epochs; only the last of a finite number
    of epochs drops a remainder. The batches do not depend on the number of threads or workers.

    Args:
      source: entries by position (`__len__` and `__getitem__`, called from several threads). Worker
        processes each get a pickled copy, and one of `transform`.
      batch_size: pairs per step over all processes; this process yields those of `rows`.
      seed: determines the order.
      transform: maps an entry to a pytree of arrays of fixed shapes, which are stacked to batches;
        for preference records, `pair_transform`. None if the entries are such trees already.
      batch_transform: maps such a batch to the one that is yielded. None for the identity.
      rows: positions in every batch of the pairs that this process reads; None for all.
      shuffle: False keeps the order of the source.
      epochs: passes over the source; None repeats it forever.
      workers: number of reader processes; 0 reads in this process with threads.
      threads: number of reader threads in this process; a worker has one. 0 reads a batch when it
        is requested, without threads.
      prefetch: number of batches that the threads, or each worker, read ahead.

    Raises:
      UserError: the data set is empty; while iterating, a record is corrupt or invalid, or a worker
        has died.
    """
    # Slow to import: planning, sampling and benchmarks read no batches and should not pay for it.
    import grain

    from focusdpo_jax.data import order

    if not len(source):
        raise UserError("the data set is empty; build it with at least one record")
    dataset = grain.MapDataset.source(source).repeat(epochs)
    if shuffle:
        dataset = order.Shuffled(dataset, len(source), seed)
    if rows is not None:
        dataset = order.ProcessShard(dataset, batch_size, rows)
    if transform is not None:
        dataset = dataset.map(transform)
    local_size = batch_size if rows is None else len(rows)
    dataset = dataset.batch(local_size, drop_remainder=True)
    if batch_transform is not None:
        dataset = dataset.map(batch_transform)
    return Batches(
        dataset,
        workers,
        grain.ReadOptions(num_threads=1 if workers else threads, prefetch_buffer_size=prefetch),
    )


class Batches:
    """Batches of a data set in order. The position is the only state.

    Nothing is read, and no process is started, before the first batch is requested.
    """

    def __init__(self, dataset: "grain.MapDataset", workers: int, options: "grain.ReadOptions"):
        """Initialises it with a data set of batches; see `make_loader` for the arguments."""
        self._dataset, self._workers, self._options = dataset, workers, options
        self._given = 0
        self._iterator: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
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
                f"a process that reads data has died ({error}), perhaps from a lack of memory or "
                f"of space in /dev/shm; give fewer than config.data.workers = {self._workers}"
            ) from error
        self._given += 1
        return batch

    def get_state(self) -> dict:
        """Returns the position after the last batch, as JSON values for `set_state`."""
        return {"next_index": self._given}

    def set_state(self, state: dict) -> None:
        """Continues from a state of an iterator of the same data set with any number of workers."""
        self.close()
        self._given = state["next_index"]

    def close(self) -> None:
        """Stops the worker processes; the next request for a batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _open(self) -> Iterator[Any]:
        rest = self._dataset.slice(slice(self._given, None)).to_iter_dataset(self._options)
        if self._workers:
            import grain

            if (
                not flags.FLAGS.is_parsed()
            ):  # Grain reads its own flags, even without a command line.
                flags.FLAGS.mark_as_parsed()
            rest = rest.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, self._options.prefetch_buffer_size),
                worker_init_fn=_start_worker,
            )
        return iter(rest)


def _start_worker(index: int, count: int) -> None:
    """Keeps accelerators and signals with the training process, and limits OpenCV to one thread."""
    import cv2

    del index, count
    jax.config.update("jax_platforms", "cpu")
    for number in (signal.SIGINT, signal.SIGTERM):  # Often sent to all processes of a run.
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exits when the parent has ended; Grain's workers would wait forever for a killed parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class Prefetcher:
    """Prepares the next batch while the current step runs.

    Attributes:
      batch: the batch of the current step.
      state: the loader's state before that batch.
    """

    def __init__(self, batches: Batches, prepare: Callable[[Any], Any]):
        """Takes a loader, and a function that starts the transfer of a batch to the device."""
        self._batches, self._prepare = batches, prepare
        self.advance()

    def advance(self) -> None:
        """Moves on to the next batch; call it after the current step has been dispatched."""
        self.state = self._batches.get_state()
        self.batch = self._prepare(next(self._batches))


def pair_transform(
    *, tokenize: Tokenize, num_subjects: int, reference_size: int | None = None
) -> Callable[[dict], PreferenceBatch]:
    """Returns a function from a record to one example, a `PreferenceBatch` without the batch axis.

    Args:
      tokenize: maps a caption to token ids, int32 [text encoders, length].
      num_subjects: subject slots of a batch (S); a record with more subjects raises UserError.
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
    source: Source,
    *,
    batch_size: int,
    transform: Callable[[dict], PreferenceBatch],
) -> Iterator[PreferenceBatch]:
    """Yields one pass over the source in its order, in full batches of one shape.

    The last batch is padded with copies of the last record, with `index` -1: exclude those rows.
    Every process yields whole batches.

    Args:
      source: records.
      batch_size: rows of a batch.
      transform: result of `pair_transform`.
    """
    last = len(source) - 1
    for start in range(0, len(source), batch_size):
        examples = []
        for position in range(start, start + batch_size):
            example = transform(source[min(position, last)])
            if position > last:
                example = dataclasses.replace(example, index=np.int64(-1))
            examples.append(example)
        yield jax.tree.map(lambda *rows: np.stack(rows), *examples)
