"""Progress in the log: a line every ten seconds, and none for quick work."""

import itertools

import pytest

from focusdpo_jax import progress, toybox
from focusdpo_jax.data import dataset


@pytest.fixture
def lines(monkeypatch):
    """The lines that were logged; every look at the clock takes four seconds."""
    logged, clock = [], itertools.count(0, 4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        progress.logging, "info", lambda text, *values: logged.append(text % values)
    )
    return logged


def test_every_ten_seconds_and_at_the_end(lines):
    shown = progress.ItemProgress("pairs encoded", 50)
    for _ in range(5):
        shown.add(10)
    # At 12 s, 3 of 5 tens are done; at 20 s all are.
    assert lines == [
        "pairs encoded: 30 of 50, 2.5/s, about 8 s left",
        "pairs encoded: 50 of 50, 2.5/s, about 0 s left",
    ]


def test_quick_work_logs_nothing(lines):
    shown = progress.ItemProgress("pairs encoded", 2)
    shown.add(1)
    shown.add(1)
    assert not lines


def test_a_data_set_that_is_built_shows_progress(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    with caplog.at_level("INFO", logger="absl"):
        dataset.build_toybox(tmp_path, toybox.World(0, 32), {"train": 3, "test": 1})
    text = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("records built: 2 of 3") for line in text)
    assert not any("tensorflow_datasets" in record.pathname for record in caplog.records)
