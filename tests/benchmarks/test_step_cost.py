"""The cost of a step equals the recorded one."""

import copy
import json

import pytest


@pytest.fixture(scope="module")
def step_cost(import_benchmark):
    return import_benchmark("step_cost")


@pytest.fixture(scope="module")
def record(step_cost):
    return json.loads(step_cost.RECORD.read_text())


def test_a_step_costs_what_is_recorded(step_cost, record):
    assert step_cost.differences(record, step_cost.measure()) == []


def test_growth_is_reported_with_the_command_that_records_it(step_cost, record):
    def told(name, factor, version=record["jax"]):
        found = copy.deepcopy(record) | {"jax": version}
        found["cases"]["toybox"]["update"][name] *= factor
        return step_cost.differences(record, found)

    assert told("bytes", 1.01) == [] and told("bytes", 1.03, "another") == []
    (line,) = told("matmul_flops", 1.001, "another")
    assert line.startswith("toybox, update: matmul_flops 3.") and "(+0.10%)" in line
    assert line.endswith("python benchmarks/step_cost.py --record")
    assert len(told("bytes", 1.03)) == len(told("others", 1.001)) == 1
    found = copy.deepcopy(record)
    del found["cases"]["toybox"]["update"]
    assert "no such program" in step_cost.differences(record, found)[0]
