import itertools
import json

import numpy as np
import pytest

from focusdpo_jax.data import dataset, loader, toybox
from focusdpo_jax.errors import UserError

SIZE = 12
SOURCE = dataset.ToyboxSource(toybox.World(resolution=32), "train", SIZE)


def make(source=SOURCE, **changes):
    slots = changes.pop("num_subjects", 3)
    transform = loader.pair_transform(
        tokenize=lambda c: np.array([[len(c)], [ord(c[2])]]), num_subjects=slots
    )
    arguments = dict(batch_size=4, seed=1, transform=transform)
    return loader.make_loader(source, **{**arguments, **changes})


def indices(iterator, count=None):
    return [batch.index.tolist() for batch in itertools.islice(iterator, count)]


def test_batches_hold_the_records_they_name():
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


def test_without_shuffling_the_order_is_that_of_the_source():
    assert indices(make(shuffle=False, epochs=1)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_leftovers_are_dropped_at_the_very_end_only():
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
    shares = [indices(make(process_index=p, process_count=2, epochs=1)) for p in range(2)]
    for whole, first, second in zip(indices(make(epochs=1)), *shares, strict=True):
        assert not set(first) & set(second)
        assert first + second == whole
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
    world = toybox.World(resolution=32, count_probabilities=(0.0, 0.0, 1.0))
    with pytest.raises(UserError, match="subjects has 3 entries; 1 to 2 fit"):
        next(make(dataset.ToyboxSource(world, "train", 4), num_subjects=2))


def test_evaluation_keeps_the_order_and_fills_the_last_batch():
    transform = loader.pair_transform(tokenize=lambda c: np.array([[len(c)]]), num_subjects=3)
    arguments = dict(batch_size=8, transform=transform)
    batches = list(loader.evaluation_batches(SOURCE, **arguments))
    assert [b.index.tolist() for b in batches] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, -1, -1, -1, -1],
    ]
    np.testing.assert_array_equal(batches[1].chosen[7], SOURCE[11]["chosen"])


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="batch_size is 4 and there are 3 processes"):
        make(process_count=3)
