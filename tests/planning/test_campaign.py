"""The cost of a long run, computed by hand."""

import pytest

from focusdpo_jax.planning.campaign import Assumptions, cost

PLAN = {
    "chips": 8,
    "batch_size": 16,
    "accumulate": 1,
    "checkpoint_every": 100,
    "pairs_per_second": 10.0,
    "record_bytes": 4e6,
    "checkpoint_bytes": 6e9,
    "checkpoint_bytes_per_chip": 6e9,
}


def test_training_alone():
    found = cost(
        PLAN | {"checkpoint_bytes": 0, "checkpoint_bytes_per_chip": 0}, 4, Assumptions(pairs=36000)
    )
    assert (found["hosts"], found["hours"], found["chip_hours"]) == (2, 1.0, 8.0)
    assert (found["reads_per_second"], found["bytes_per_second"]) == (5.0, 20e6)
    assert found["waiting_for_data"] == 0 and found["files"] == 36


def test_slow_reading_is_waited_for():
    # 36000 pairs of 4 MB by two machines of 10 MB/s take 7200 s, twice the training.
    found = cost(
        PLAN, 4, Assumptions(pairs=36000, read_bandwidth=10e6, host_copy=1e99, write_bandwidth=1e99)
    )
    assert found["training"] == 3600 and found["waiting_for_data"] == pytest.approx(3600)
    assert found["hours"] == pytest.approx(2)


def test_checkpoints_stop_the_chips_for_the_copy_and_for_slow_writing():
    # 32000 pairs are 2000 updates and 20 checkpoints, 160 s apart; writing takes 6e9 / 2 / 15e6 = 200 s.
    found = cost(PLAN, 4, Assumptions(pairs=32000, host_copy=3e9, write_bandwidth=15e6))
    assert found["checkpoint_count"] == 20
    assert found["checkpoints"] == pytest.approx(20 * (2 + 40))


def test_without_a_speed_there_is_no_cost():
    with pytest.raises(ValueError, match="pairs_per_second"):
        cost(PLAN | {"pairs_per_second": None}, 4)
