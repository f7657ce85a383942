"""Toybox's results table: estimates as JSON values, verdicts, and the exact text."""

import json

import numpy as np
import pytest

from focusdpo_jax.evaluation import statistics, toybox_results

NAN = np.nan


def measures(share, n=200):
    """Half of the scenes have leakage defined; `share` of the subjects are right."""
    right = (np.arange(n) < share * n).astype(float)
    leaks = np.where(np.arange(n) % 2, 1 - right, NAN)
    return {"fidelity": right[:, None], "leakage": leaks[:, None], "pattern": np.full(n, NAN)}


def test_summary_is_json_without_undefined_metrics():
    results = toybox_results.summarize(measures(0.5), measures(0.8), seed=0)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert list(results["metrics"]) == ["fidelity", "leakage"]
    policy = results["metrics"]["leakage"]["policy"]
    assert policy["n"] == 100 and policy["mean"] == pytest.approx(0.2)
    assert 0.1 < policy["low"] < 0.2 < policy["high"] < 0.3


def test_a_side_without_values():
    policy = measures(0.8) | {"leakage": np.full(200, NAN)}
    results = toybox_results.summarize(measures(0.5), policy, seed=0)
    assert results["metrics"]["leakage"]["policy"] == dict(mean=None, low=None, high=None, n=0)
    assert toybox_results.format_table(results).splitlines()[3].split()[-2:] == ["-", "100/0"]


def test_verdict_needs_an_interval_without_zero_and_uses_the_direction():
    def difference(low, high):
        return {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}

    assert toybox_results.verdict("fidelity", difference(0.1, 0.2)) == "better"
    assert toybox_results.verdict("leakage", difference(0.1, 0.2)) == "worse"
    assert toybox_results.verdict("missing", difference(-0.2, -0.1)) == "better"
    assert toybox_results.verdict("hue", difference(-0.2, -0.1)) == "worse"
    assert toybox_results.verdict("fidelity", difference(-0.1, 0.3)) == ""


def test_the_difference_of_a_summary_is_of_the_same_scenes():
    base, policy = measures(0.5), measures(0.8)
    found = toybox_results.summarize(base, policy, seed=0)["metrics"]["fidelity"]
    expected = statistics.bootstrap_difference(base["fidelity"], policy["fidelity"], seed=0)
    assert found["difference"] == expected._asdict()
    assert found["difference"]["mean"] == pytest.approx(0.3)


def test_table():
    def estimate(mean, low, high, n=200):
        return {"mean": mean, "low": low, "high": high, "n": n}

    table = toybox_results.format_table(
        {
            "metrics": {
                "fidelity": {
                    "base": estimate(0.5, 0.43, 0.57),
                    "policy": estimate(1, 1, 1),
                    "difference": estimate(0.5, 0.43, 0.57),
                },
                "hue_leakage": {
                    "base": estimate(0.25, 0.2, 0.3, 90),
                    "policy": estimate(0.2, 0.1, 0.25, 88),
                    "difference": estimate(-0.05, -0.1, 0.004, 80),
                },
            }
        }
    )
    assert table.splitlines() == [
        "measure        base                    policy                  policy - base         vs. base  scenes",
        "-" * 101,
        "fidelity ↑      50.0 % [ 43.0,  57.0]  100.0 % [100.0, 100.0]  +50.0 [+43.0, +57.0]  better    200",
        "hue leakage ↓   25.0 % [ 20.0,  30.0]   20.0 % [ 10.0,  25.0]   -5.0 [-10.0,  +0.4]            90/88",
    ]


def test_table_of_the_base_alone():
    table = toybox_results.format_table(toybox_results.summarize(measures(1.0), seed=0))
    assert table.splitlines()[0].split() == ["measure", "base", "scenes"]
    assert "fidelity ↑" in table and "policy" not in table
