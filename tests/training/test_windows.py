"""A run's metrics: what is averaged over a window, and when it is reported."""

import jax.numpy as jnp
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.training import windows as windows_module
from focusdpo_jax.training.metrics import StepMetrics
from focusdpo_jax.training.windows import Windows


class Recorder:
    """In the place of writer, progress and checkpoints."""

    def __init__(self):
        self.reports, self.shown, self.closed, self.latest = [], [], False, 7

    def write_scalars(self, step, values):
        self.reports.append((step, values))

    def show(self, step, values, matmul_flops):
        self.shown.append((step, values, matmul_flops))
        return {"pairs_per_second": 2.0}

    def close(self):
        self.closed = True


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def windows(recorder):
    return Windows(recorder, recorder, recorder, ["noisy", "clean"])


def measured(**values):
    """The metrics of a step."""
    return StepMetrics.from_model_output(**{name: jnp.float32(x) for name, x in values.items()})


def test_means_are_over_a_windows_steps_and_over_each_buckets(windows, recorder):
    windows.add("noisy", measured(loss=1.0, gate=0.5), 10.0)
    windows.add("clean", measured(loss=2.0), 20.0)
    windows.add("noisy", measured(loss=6.0, gate=1.0), 10.0)
    windows.end(3)
    windows.report()
    assert recorder.reports == [
        (
            3,
            {
                "loss": 3.0,
                "gate": 0.75,
                "noisy/loss": 3.5,
                "noisy/gate": 0.75,
                "clean/loss": 2.0,
                "pairs_per_second": 2.0,
            },
        )
    ]
    assert recorder.shown == [(3, {"loss": 3.0}, 40.0)]


def test_a_window_is_reported_once_and_only_on_request(windows, recorder):
    windows.add("all", measured(loss=1.0), 1.0)
    windows.report()
    assert recorder.reports == []  # It has not ended.
    windows.end(1)
    windows.add("all", measured(loss=5.0), 1.0)
    windows.report()
    windows.report()
    assert [(step, values["loss"]) for step, values in recorder.reports] == [(1, 1.0)]
    windows.end(2)
    windows.report()
    assert [(step, values["loss"]) for step, values in recorder.reports] == [(1, 1.0), (2, 5.0)]


def test_what_is_not_finite_is_an_error_and_no_report(windows, recorder):
    windows.add("all", measured(loss=float("nan")), 1.0)
    windows.end(4)
    with pytest.raises(
        UserError, match=r"loss = nan at step 4. The checkpoint of step 7 is intact"
    ):
        windows.report()
    assert recorder.closed and recorder.reports == []


def test_logit_scales_are_logged_once_all_buckets_were_seen(recorder, monkeypatch):
    lines = []
    monkeypatch.setattr(
        windows_module.logging, "info", lambda text, *values: lines.append(text % values)
    )
    windows = Windows(recorder, recorder, recorder, ["noisy", "clean"])
    for number, seen in enumerate(
        ([("noisy", 0.5)], [("noisy", 2.0)], [("clean", 0.25)], [("noisy", 9.0), ("clean", 9.0)]), 1
    ):
        for bucket, scale in seen:
            windows.add(bucket, measured(loss=1.0, logit_scale=scale), 1.0)
        windows.end(number)
        windows.report()
    # The first value of each bucket.
    assert lines == [
        "logit scale (mean of |beta / 2 margin|) of the first 3 steps: noisy 0.5, clean 0.25"
    ]
    assert recorder.reports[0][1]["noisy/loss"] == 1.0  # Also in a window of one bucket.


def test_the_norm_of_a_step_of_several_buckets_is_of_no_bucket(recorder):
    windows = Windows(recorder, recorder, recorder, ["noisy", "clean"], accumulate=2)
    windows.add("noisy", measured(loss=1.0, gradient_norm=0.0), 10.0)
    windows.add("clean", measured(loss=2.0, gradient_norm=6.0), 10.0)
    windows.end(1)
    windows.report()
    ((_, values),) = recorder.reports
    assert values["gradient_norm"] == 3.0 and values["clean/loss"] == 2.0
    assert not [name for name in values if name.endswith("/gradient_norm")]
