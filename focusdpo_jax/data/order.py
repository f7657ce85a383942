"""The order of training records, and each process's part of it, as data sets of grain."""

import functools

import grain
import numpy as np


class Shuffled(grain.MapDataset):
    """A repeated data set, every epoch in an order of its own.

    grain's own shuffle draws one of at least 2^16 places until it is one of the data set, which in a
    small one takes a millisecond a record.
    """

    def __init__(self, repeated, epoch_length, seed):
        """Takes the data set, the length of one of its epochs, and what determines the orders."""
        super().__init__(repeated)
        self._epoch_length, self._seed = epoch_length, seed

    def __len__(self):
        return len(self._parent)

    def __getitem__(self, position):
        epoch, place = divmod(position, self._epoch_length)
        order = _order(self._seed, epoch, self._epoch_length)
        return self._parent[epoch * self._epoch_length + int(order[place])]


@functools.lru_cache(maxsize=4)
def _order(seed, epoch, length):
    return np.random.default_rng((seed, epoch)).permutation(length)


class Share(grain.MapDataset):
    """The part of every batch of a stream that one process reads."""

    def __init__(self, stream, batch_size, local_size, index):
        """Takes the stream, records of a batch over all and for each process, and which this is."""
        super().__init__(stream)
        self._batch_size, self._local_size, self._index = batch_size, local_size, index

    def __len__(self):
        return len(self._parent) // self._batch_size * self._local_size

    def __getitem__(self, position):
        batch, row = divmod(position, self._local_size)
        return self._parent[batch * self._batch_size + self._index * self._local_size + row]
