"""The command for a machine with a GPU, run on a CPU; a failing job does not affect the results of others."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

PEERS = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


@pytest.fixture(scope="module")
def accelerator(import_benchmark):
    """accelerator("running") is its module."""
    return lambda name: import_benchmark(f"accelerator.{name}")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs the command; returns what it printed, the record and the table."""
    folder = tmp_path_factory.mktemp("accelerator")

    def run():
        found = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.accelerator",
                "--size=debug",
                "--minutes=8",
                "--parts",
                "attention",
                "step-64",
                "--peers",
                "eager",
                f"--output={folder}",
            ],
            # Threads of PyTorch that wait would take the cores from others.
            cwd=tiny.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        log = (folder / "accelerator.log").read_text()
        assert found.returncode == 0, found.stderr + log
        record = json.loads((folder / "accelerator.json").read_text())
        assert all(job["status"] == "done" for job in record["jobs"].values()), log
        return found.stdout, record, (folder / "accelerator.md").read_text()

    return run


@pytest.fixture(scope="module")
def rehearsal(command):
    return command()


def test_the_record_contains_where_it_was_measured(rehearsal):
    _, record, page = rehearsal
    device = record["device"]
    assert device["platform"] == "cpu" and device["matmul_peak"] > 1e9
    assert device["versions"]["jax"] == jax.__version__
    assert page.startswith(f"# {device['name']}\n")


def test_attention_is_as_exact_as_its_type(rehearsal):
    rows = rehearsal[1]["jobs"]["attention"]["rows"]
    assert {row["use"] for row in rows} == {"training", "inference"}
    for row in rows:
        assert not row["refused"] and row["ratio"] > 0, row
        errors = [*row["forward_error"].values(), *row["gradient_error"].values()]
        assert len(errors) == (4 if row["use"] == "training" else 2)
        # Each of two roundings to 8 bits is 2^-9 at most.
        assert 0 < min(errors) and max(errors) < 2**-7, row


def test_the_step_is_measured_beside_its_peer(rehearsal):
    ours, *peers = rehearsal[1]["jobs"]["step-64"]["rows"]
    numbers = [
        ours[name]
        for name in (
            "seconds",
            "compile_seconds",
            "matmul_flops",
            "memory",
            "pairs_per_second",
            "share_of_peak",
        )
    ]
    assert ours["fits"] and all(math.isfinite(x) and x > 0 for x in numbers + ours["losses"])
    assert ours["planned"]["peak"] == sum(
        ours["planned"][kind] for kind in ("held", "temporaries", "outputs")
    )
    # At step 0 policy and reference are one model; in float32 two programs of it agree.
    start = ours["at_start"]
    assert start["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert start["error_map_difference"] < 1e-4 and abs(start["half_beta_margin"]) < 1
    (peer,) = peers
    if not PEERS:
        assert peer["error"] == "not installed with torch"
        return
    assert len(peer["losses"]) == 5 and peer["ratio"] > 0
    assert peer["losses_apart"] < 1e-3


def test_a_second_run_measures_what_is_missing(rehearsal, command):
    said, record, _ = command()
    assert said.count("done before") == 2
    assert record["jobs"]["attention"] == rehearsal[1]["jobs"]["attention"]
    assert record["jobs"]["step-64"] == rehearsal[1]["jobs"]["step-64"]


def test_a_job_that_fails_or_does_not_end_costs_itself_alone(accelerator, tmp_path):
    jobs, running = accelerator("jobs"), accelerator("running")
    scripts = {
        "crashes": "row('a', 1); raise MemoryError('too large')",
        "killed": "import os; row('a', 1); os.kill(os.getpid(), 9)",
        "endless": "row('a', 1); import time; time.sleep(600)",
        "good": "row('a', 1); row('a', 2); row('b', 3)",
    }
    begin = (
        f"import json\ndef row(key, x): print('{running.MARK}' + json.dumps("
        "{'key': key, 'x': x}), flush=True)\nprint('other'); "
    )
    made = [jobs.Job(name, "none", 3 if name == "endless" else 60, "", {}) for name in scripts]
    asked, said = [], []

    def command_of(job, seconds):
        asked.append(job.name)
        return [sys.executable, "-c", begin + scripts[job.name]]

    def run(seconds=100):
        running.run_all(made, running.Record(tmp_path), command_of, seconds, report=said.append)
        return json.loads((tmp_path / "accelerator.json").read_text())["jobs"]

    first = run()
    assert {name: job["status"] for name, job in first.items()} == {
        "crashes": "failed",
        "killed": "failed",
        "endless": "stopped",
        "good": "done",
    }
    assert "MemoryError: too large" in first["crashes"]["error"]
    assert first["endless"]["seconds"] < 30
    for name in ("crashes", "killed", "endless"):
        assert [row["x"] for row in first[name]["rows"]] == [1], name
    assert [row["x"] for row in first["good"]["rows"]] == [2, 3]
    page = (tmp_path / "accelerator.md").read_text()
    assert "- crashes: failed" in page and "- endless: stopped" in page and "- good" not in page

    # What was done is kept, the rest is tried again; what was found is not lost on the way.
    scripts |= {"crashes": "pass", "killed": "row('a', 5)", "endless": "raise SystemExit(1)"}
    second = run()
    assert asked == [*scripts, "crashes", "killed", "endless"]
    assert second["good"] == first["good"] and second["killed"]["rows"] == [{"key": "a", "x": 5}]
    assert second["crashes"]["rows"] == []
    assert second["endless"]["rows"] == [{"key": "a", "x": 1, "earlier": True}]
    run(seconds=1)
    assert said[-1] == "good: done before" and said[-2] == "endless: no time left"


def test_results_of_another_device_are_kept_aside(accelerator, tmp_path):
    jobs, running = accelerator("jobs"), accelerator("running")
    device = {
        "key": "device",
        "name": "one",
        "versions": {"jax": "1"},
        "memory": 8e9,
        "matmul_peak": 1e12,
        "processors": 2,
    }
    other = jobs.Job("other", "none", 60, "", {})
    for name in ("one", "two"):
        record = running.Record(tmp_path)
        record.start(jobs.DEVICE)
        record.add(jobs.DEVICE, device | {"name": name})
        record.end(jobs.DEVICE, "done", 1.0)
        assert not record.is_done(other)
        record.start(other)
        record.end(other, "done", 1.0)
    (kept,) = [path for path in tmp_path.glob("*.json") if path.stem != "accelerator"]
    assert json.loads(kept.read_text())["device"]["name"] == "one"
    assert running.Record(tmp_path).values["device"]["name"] == "two"


@pytest.mark.usefixtures("cudnn_to_trace")
def test_the_shapes_are_those_of_every_network(accelerator):
    from focusdpo_jax.models import platforms

    attention, cases = accelerator("attention"), accelerator("cases")
    target = platforms.Target("gpu", 9.0)
    with platforms.target_platform(target):
        shapes = attention.attention_shapes(cases.generator_sizes("full"), [1024], [1])
    found = {shape[1:5]: shape for shape in shapes}
    trained = {sizes for sizes, shape in found.items() if shape.trained}
    assert {
        (4096, 4096, 10, 64),
        (1024, 1024, 20, 64),
        (16, 273, 20, 64),
        (8192, 77, 10, 64),
        (8192, 16, 10, 64),
    } <= trained
    others = {
        (16384, 16384, 1, 512),
        (257, 257, 16, 80),
        (257, 257, 16, 104),
        (77, 77, 12, 64),
        (77, 77, 20, 64),
        (197, 197, 6, 64),
    }
    assert others <= found.keys() and not others & trained
    assert found[8192, 16, 10, 64].masked and found[77, 77, 12, 64].causal


@pytest.mark.parametrize("masked,causal", [(False, False), (True, False), (False, True)])
def test_the_exact_attention_is_that_of_the_formula(accelerator, masked, causal):
    attention = accelerator("attention")
    shape = attention.Shape("", 12, 12, 2, 4, masked, causal, True)
    query, key, value, cotangent = np.random.default_rng(0).standard_normal((4, 12, 8), np.float32)
    mask = np.arange(12) < 7 if masked else None
    rows = np.array([1, 5, 11])
    cotangent = np.where(np.isin(np.arange(12), rows)[:, None], cotangent, 0)

    def plain(*arrays):
        heads = [x.reshape(1, 12, 2, 4) for x in arrays]
        return jax.nn.dot_product_attention(
            *heads,
            mask=None if mask is None else jnp.asarray(mask)[None, None, None],
            is_causal=causal,
            implementation="xla",
        ).reshape(12, 8)

    out, gradient = jax.vjp(plain, query, key, value)
    exact = attention.exact_rows(shape, query, key, value, cotangent, mask, rows)
    of_query, *others = gradient(cotangent)
    for found, right in zip((out[rows], of_query[rows], *others), exact, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_unknown_parts_are_a_mistake_in_one_line():
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", "--parts", "speed"],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert "speed: neither a part nor a job" in found.stderr.splitlines()[-1]
