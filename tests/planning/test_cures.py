"""A program that does not fit is refused with the field that makes it fit, after compiling with it."""

import pytest
import tiny

from focusdpo_jax.errors import UserError
from focusdpo_jax.planning import cures


def made(**changes):
    return {"temporaries": 8e9, "peak": 20e9, "rows_per_chip": 4, "needs_at_least": None} | changes


def trial(peaks, held=10e9, rows=None):
    """try_out of `cures.find`, and the changes that were compiled."""
    compiled = []

    def try_out(changes):
        if changes.get("mesh.fsdp") == 3:
            raise UserError("no such mesh")
        count = next(
            (v for k, v in changes.items() if k in ("evaluation.batch_size", "batch_size")), 4
        )

        def peak():
            compiled.append(changes)
            return peaks(changes)

        return held, rows or count, peak

    return try_out, compiled


def test_the_first_that_fits_when_compiled():
    try_out, compiled = trial(lambda changes: 10e9 + 3e9 * changes["evaluation.batch_size"])
    options = [{"evaluation.batch_size": 2}, {"evaluation.batch_size": 1}]
    # In proportion two rows would fit; compiled they do not.
    assert cures.find(options, made(), 14.5e9, try_out) == {
        "changes": {"evaluation.batch_size": 1},
        "peak": 13e9,
        "compiled": True,
    }
    assert compiled == options


def test_what_fits_easily_is_not_compiled():
    try_out, compiled = trial(lambda changes: 99e9)
    # 10 GB held and 2 of 8 GB of temporaries, of 15 GB or of 14.9.
    found = cures.find([{"evaluation.batch_size": 1}], made(), 15e9, try_out)
    assert found == {"changes": {"evaluation.batch_size": 1}, "peak": 12e9, "compiled": False}
    assert not compiled
    assert cures.find([{"evaluation.batch_size": 1}], made(), 14.9e9, try_out) is None
    # What remat leaves is a guess.
    assert (
        cures.find([{"model.remat": True}], made(), 99e8 * 2, try_out) is None
        and len(compiled) == 2
    )


def test_changes_that_cannot_fit_are_not_compiled():
    try_out, compiled = trial(lambda changes: 1e9)
    assert cures.find([{"evaluation.batch_size": 2}], made(), 11e9, try_out) is None
    assert cures.find([{"mesh.fsdp": 3}], made(), 100e9, try_out) is None
    assert not compiled


def test_what_the_compiler_refused_is_tried_at_most_three_times():
    try_out, compiled = trial(lambda changes: None)
    options = [{"batch_size": n} for n in (8, 4, 2, 1)]
    assert cures.find(options, made(temporaries=None, peak=None), 15e9, try_out) is None
    assert len(compiled) == 3


def test_candidates_begin_with_what_costs_least(tiny_config):
    config = tiny_config(evaluation__batch_size=4, accumulate=4, batch_size=8)
    assert cures.candidates(config, "sampling", 1)[:2] == [
        {"evaluation.batch_size": 2},
        {"evaluation.batch_size": 1},
    ]
    config = tiny.changed(config, data__cache=False)
    first, second, third, *others = cures.candidates(config, "update", 2)
    assert (first, second) == ({"model.remat": True}, {"data.cache": True})
    # Updates of as many pairs as before.
    assert third == {"batch_size": 4, "accumulate": 8}
    assert {"mesh.data": 1, "mesh.fsdp": 2} in others and {"accumulate": 1} in others
    # Four chips that would draw the same three pictures each draw one of four.
    config = tiny_config(evaluation__batch_size=3)
    assert cures.candidates(config, "sampling", 4)[0] == {"evaluation.batch_size": 4}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"cure": {"changes": {"evaluation.batch_size": 1}, "peak": 13e9, "compiled": True}},
            "it needs 20.0 GB of the chip's 16.0 GB; give config.evaluation.batch_size = 1 (13.0 GB)",
        ),
        ({"cure": None}, "nothing that was tried makes it fit: take more chips"),
        (
            {"cure": {"changes": {"data.cache": True}, "peak": 13e9, "compiled": False}},
            "True (about 13.0 GB)",
        ),
        (
            {"peak": None, "needs_at_least": 40e9},
            "it needs more than 40.0 GB of the chip's 16.0 GB",
        ),
    ],
)
def test_words(changes, message):
    assert message in cures.in_words("sampling", made(**changes), 16e9)
