import itertools
import json
import os
import signal
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest

from focusdpo_jax import toybox
from focusdpo_jax.data import dataset, loader
from focusdpo_jax.errors import UserError

SIZE = 12
SOURCE = dataset.ToyboxSource(toybox.World(resolution=32), "train", SIZE)
THREE = toybox.World(resolution=32, count_probabilities=(0.0, 0.0, 1.0))


def make(source=SOURCE, **changes):
    slots = changes.pop("num_subjects", 3)
    transform = loader.pair_transform(
        tokenize=lambda c: np.array([[len(c)], [ord(c[2])]]), num_subjects=slots
    )
    arguments = dict(batch_size=4, seed=1, transform=transform)
    return loader.make_loader(source, **{**arguments, **changes})


def indices(iterator, count=None):
    return [batch.index.tolist() for batch in itertools.islice(iterator, count)]


def test_batches_contain_the_records_of_their_indices():
    batch = next(make())
    for row, index in enumerate(batch.index):
        record = SOURCE[index]
        np.testing.assert_array_equal(batch.chosen[row], record["chosen"])
        np.testing.assert_array_equal(batch.prior_mask[row], record["prior_mask"])
        assert batch.token_ids[row].tolist() == [
            [len(record["caption"])],
            [ord(record["caption"][2])],
        ]
        assert batch.present[row].sum() == len(record["subjects"])
        different = (batch.chosen[row] != batch.rejected[row]).any(-1)
        assert different.any() and not (different & ~batch.prior_mask[row]).any()


def test_order_depends_on_the_seed_and_the_epoch_alone():
    first = indices(make(), 6)
    assert first == indices(make(threads=0), 6)
    assert first != indices(make(seed=2), 6)
    one, two = first[:3], first[3:]
    assert sorted(sum(one, [])) == sorted(sum(two, [])) == list(range(SIZE))
    assert one != two


def test_batch_transform_rows_match_the_records():
    table = np.arange(SIZE * 3).reshape(SIZE, 3)
    one_by_one = loader.make_loader(list(table), batch_size=4, seed=1)
    at_once = loader.make_loader(
        range(SIZE),
        batch_size=4,
        seed=1,
        threads=0,
        batch_transform=lambda positions: table[positions],
    )
    for _ in range(4):
        np.testing.assert_array_equal(next(at_once), next(one_by_one))
    assert at_once.get_state() == one_by_one.get_state()


def test_without_shuffling_the_order_is_that_of_the_source():
    assert indices(make(shuffle=False, epochs=1)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_remainder_is_dropped_after_the_last_epoch_only():
    assert len(indices(make(batch_size=5, epochs=1))) == 2
    assert len(indices(make(batch_size=5, epochs=2))) == 4


def test_state_resumes_exactly():
    iterator = make()
    indices(iterator, 3)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(3)]
    fresh = make()
    fresh.set_state(json.loads(state))
    for batch in expected:
        again = next(fresh)
        np.testing.assert_array_equal(batch.index, again.index)
        np.testing.assert_array_equal(batch.chosen, again.chosen)


def test_processes_share_the_global_batches():
    shares = [indices(make(rows=rows, epochs=1)) for rows in ([0, 3], [1, 2])]
    for whole, first, second in zip(indices(make(epochs=1)), *shares, strict=True):
        assert [first[0], *second, first[1]] == whole
    assert sorted(sum(shares[0] + shares[1], [])) == list(range(SIZE))


def test_corrupt_record_is_named():
    class Corrupt(dataset.ToyboxSource):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            if index == 7:
                record["subjects"][0]["mask"] = np.zeros((32, 32), bool)
            return record

    with pytest.raises(UserError, match=r"record 7: subjects\[0\].mask is empty"):
        indices(make(Corrupt(SOURCE.world, "train", SIZE), epochs=1))


def test_too_many_subjects_are_named():
    with pytest.raises(UserError, match="subjects has 3 entries; 1 to 2 fit"):
        next(make(dataset.ToyboxSource(THREE, "train", 4), num_subjects=2))


def test_evaluation_keeps_the_order_and_fills_the_last_batch():
    transform = loader.pair_transform(tokenize=lambda c: np.array([[len(c)]]), num_subjects=3)
    arguments = dict(batch_size=8, transform=transform)
    batches = list(loader.evaluation_batches(SOURCE, **arguments))
    assert [b.index.tolist() for b in batches] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, -1, -1, -1, -1],
    ]
    np.testing.assert_array_equal(batches[1].chosen[7], SOURCE[11]["chosen"])


def test_workers_yield_the_same_batches_and_resume_from_threads():
    expected, state = indices(make(), 9), make().get_state()
    for start, workers in ((0, 0), (3, 2), (6, 0)):
        iterator = make(workers=workers)
        iterator.set_state(json.loads(json.dumps(state)))
        assert indices(iterator, 3) == expected[start : start + 3]
        state = iterator.get_state()
        iterator.close()


def test_worker_errors_and_death_are_reported():
    with pytest.raises(UserError, match=r"record \d+: subjects has 3 entries; 1 to 2 fit"):
        next(make(dataset.ToyboxSource(THREE, "train", 4), num_subjects=2, workers=1))

    class Deadly(dataset.ToyboxSource):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"has died .*; give fewer than config.data.workers = 1"):
        next(make(Deadly(SOURCE.world, "train", 4), workers=1))


KILLED = """
import os, signal, numpy as np
from focusdpo_jax.data import loader

def transform(entry):
    return np.array([os.getpid()])

batches = loader.make_loader([0] * 9, batch_size=1, seed=0, transform=transform, workers=1)
print(next(batches)[0, 0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_was_killed():
    # A worker has the pipe open, too: it is read until both have ended.
    result = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, timeout=60)
    assert result.returncode == -signal.SIGKILL and result.stdout


def test_workers_leave_accelerators_alone():
    def transform(record):
        return np.array([jax.config.jax_platforms == "cpu", cv2.getNumThreads() == 1])

    assert next(make(workers=1, transform=transform)).all()


def test_the_batch_ahead_is_not_yet_part_of_the_state():
    ahead, seen = loader.Prefetcher(make(), lambda batch: batch), []
    for _ in range(3):
        seen.append((ahead.state, ahead.batch.index.tolist()))
        ahead.advance()
    assert [index for _, index in seen] == indices(make(), 3)
    for state, index in seen:
        again = make()
        again.set_state(state)
        assert next(again).index.tolist() == index
