"""Grain data sets that define the order of training records and each process's part of it."""

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np


class Shuffled(grain.MapDataset):
    """A repeated data set in which every epoch has its own order.

    Grain's own shuffle samples positions from at least 2^16 until one is in the data set, which
    takes a millisecond per record for small data sets.
    """

    def __init__(self, repeated: grain.MapDataset, epoch_length: int, seed: int):
        """Takes the repeated data set, the length of one epoch, and the seed of the orders."""
        super().__init__(repeated)
        self._epoch_length, self._seed = epoch_length, seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, position: int) -> Any:
        epoch, place = divmod(position, self._epoch_length)
        order = _order(self._seed, epoch, self._epoch_length)
        return self._parent[epoch * self._epoch_length + int(order[place])]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


class ProcessShard(grain.MapDataset):
    """The rows of every batch of a stream that one process reads."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        """Takes the stream, the global batch size, and the process's rows of a batch."""
        super().__init__(stream)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, position: int) -> Any:
        batch, row = divmod(position, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]
