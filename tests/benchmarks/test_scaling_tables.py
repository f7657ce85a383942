"""The tables of docs/scaling.md come from kept plans, and nothing is planned twice."""

import json
import re

import pytest


@pytest.fixture(scope="module")
def tables(import_benchmark):
    return import_benchmark("scaling_tables")


def plan(chip="TPU v5p", fits=True):
    update = {
        "when": "of every batch",
        "peak": 34e9,
        "held": 16e9,
        "fits": True,
        "estimate": {"seconds": 0.3, "bytes": 1e9},
    }
    sampling = {"when": "of every sample", "peak": 20e9, "held": 16e9, "fits": fits, "estimate": {}}
    if not fits:
        sampling["cure"] = {"changes": {"evaluation.batch_size": 1}, "peak": 17e9}
    return {
        "chip": chip,
        "chips": 4,
        "topology": "v5p:2x2x1",
        "mesh": {"data": 4, "fsdp": 1, "tensor": 1},
        "batch_size": 4,
        "remat": False,
        "looped": True,
        "cache": False,
        "accumulate": 4,
        "checkpoint_every": 100,
        "chips_per_host": 4,
        "record_bytes": 4e6,
        "checkpoint_bytes": 7e9,
        "checkpoint_bytes_per_chip": 7e9,
        "fits": fits,
        "programs": {"update": update, "sampling": sampling},
        "bytes_per_chip": {"peak": 34e9, "limit": 100e9},
        "seconds_per_batch": 0.4,
        "seconds_links": 0.1,
        "pairs_per_second": 10.0,
        "model_flops_utilisation": 0.3,
    }


def test_rows_are_commands(tables):
    for group in ("gpus", "tpus", "chips"):
        keys = [tables.path_of(tables.ROOT, group, row, "c") for row in tables.rows(group)]
        assert len(set(keys)) == len(keys) > 0
    line = tables.printed(tables.command(*tables.rows("gpus")[1]))
    assert line == (
        "python -m focusdpo_jax.plan --config=configs/sdxl_dpo.py --topology=h100 --json "
        f"--config.model.adapter={tables.PROJECTION} --config.batch_size=1 "
        "'--programs=update,reference pass'"
    )
    assert "--programs" not in tables.printed(tables.command(*tables.rows("gpus")[0]))
    counts = [
        row[2]["config.mesh.data"] * row[2]["config.mesh.fsdp"] for row in tables.rows("chips")
    ]
    assert set(counts) == {4, 16, 64, 256}


def test_made_once_and_written_between_the_markers(tables, tmp_path, monkeypatch):
    calls = []

    def run(command, **options):
        calls.append(command)
        made = plan("NVIDIA H100 80GB HBM3", fits=len(calls) > 1)
        return type("Run", (), {"stdout": json.dumps(made), "stderr": "", "returncode": 0})

    document = tmp_path / "scaling.md"
    document.write_text("Before.\n<!-- gpus: begin -->\nold\n<!-- gpus: end -->\nAfter.\n")
    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(
        tables.sys,
        "argv",
        [
            "scaling_tables",
            f"--output={tmp_path}",
            f"--document={document}",
            "--commit=abc",
            "--rows",
            "gpus",
            "--trained",
            "adapter",
            "lora",
            "--machines",
            "h100",
            "--prefix=nice -n 5",
        ],
    )
    tables.main()
    tables.main()
    assert len(calls) == 2 and calls[0][:3] == ["nice", "-n", "5"]
    text = document.read_text()
    assert text.startswith("Before.\n<!-- gpus: begin -->\n| machine |") and text.endswith(
        "-->\nAfter.\n"
    )
    assert "old" not in text and "Commit abc, jax " in text
    assert "| no | sampling: `evaluation.batch_size = 1`" in text


def test_a_row_is_read_from_the_first_commit_that_has_it(tables, tmp_path, monkeypatch):
    made = plan() | {"versions": {"jax": "1"}, "date": "2026-11-29"}
    rows = {row[:2]: row for row in tables.rows("chips")}
    for commit, trained in (("old", "adapter"), ("old", "lora"), ("new", "lora")):
        path = tables.path_of(tmp_path, "chips", rows["v5p:2x2x1", trained], commit)
        path.write_text(json.dumps(made | {"chips": 8 if commit == "new" else 4}))
    document = tmp_path / "scaling.md"
    document.write_text("<!-- chips: begin -->\n<!-- chips: end -->\n")
    monkeypatch.setattr(
        tables.sys,
        "argv",
        ["", f"--output={tmp_path}", f"--document={document}", "--commit", "new", "old"],
    )
    tables.main()
    text = document.read_text()
    assert "| v5p:2x2x1 | 4 | resampler adapter |" in text and "| v5p:2x2x1 | 8 | LoRA |" in text
    assert "Commits old (v5p:2x2x1 resampler adapter); new (v5p:2x2x1 LoRA), jax 1" in text


def test_steps_and_their_cost(tables):
    header, _, row = tables.step_table([plan() | {"row": ("v5p:2x2x1", "LoRA")}])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1
    found = dict(zip((cell.strip() for cell in header.strip("|").split("|")), cells, strict=True))
    assert (found["compute, s"], found["links, s"], found["pairs/s per chip"]) == (
        "0.3",
        "0.1",
        "2.5",
    )
    # A million pairs at 10 a second on four chips are 111 chip-hours, checkpoints 625 times 0.7 s.
    assert found["chip-hours for a million pairs"] == "112"


def test_a_slice_whose_whole_run_is_planned_has_the_peak_of_every_program(tables):
    whole = plan(fits=False) | {"row": ("v5p:2x2x1", "LoRA")}
    step = whole | {"programs": {"update": whole["programs"]["update"]}}
    assert tables.slices_table([step]) == tables.step_table([step])
    *_, empty, header, _, row = tables.slices_table([step, whole])
    assert empty == "" and "update, GB | sampling, GB" in header
    assert row.startswith("| 4 x TPU v5p | LoRA | held | 34.0 | 20.0 | 100.0 | no |")


def test_updates_are_compared_with_those_of_the_earlier_commit(tables):
    row = ("v5e:4x4", "LoRA")
    estimate = {"seconds": 0.5, "matmul_flops": 0.25 * 197e12}
    after = plan() | {"row": row}
    after["programs"]["update"]["estimate"] |= {"matmul_flops": 0.15 * 197e12}
    lines = tables.comparison_table([plan() | {"row": row, "estimate": estimate, "now": after}])
    assert lines[2].endswith("| off | loop | 0.5 | 0.3 | 0.60 | 50% | 50% |")

    earlier = tables.rows("before")
    assert {row[:2] for row in earlier} <= {row[:2] for row in tables.rows("tpus")}
    assert "plan_at_commit.py" in tables.printed(tables.command(*earlier[0]))
    # The rows of the earlier commit stay when the code changes.
    assert len({tables.path_of(tables.ROOT, "before", earlier[0], commit) for commit in "ab"}) == 1


def test_kept_rows_are_those_of_the_document(tables, tmp_path, monkeypatch):
    document = tmp_path / "scaling.md"
    document.write_text(tables.DOCUMENT.read_text())
    commits = re.search(r"scaling_tables.py --commit ([\w ]+)", document.read_text())
    assert commits is not None  # The document's own command.
    argv = ["scaling_tables", f"--document={document}", "--commit", *commits[1].split()]
    monkeypatch.setattr(tables.sys, "argv", argv)
    tables.main()
    assert document.read_text() == tables.DOCUMENT.read_text()
    # Rows of the earlier commit alone do not replace the comparison.
    monkeypatch.setattr(tables.sys, "argv", [*argv[:2], "--commit", "another"])
    tables.main()
    assert document.read_text() == tables.DOCUMENT.read_text()
