"""A full disk while each kind of file is written: one clear error, and no incomplete file.

A limit of the file size simulates the full disk: writing fails in the same place.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from focusdpo_jax import files, sample
from focusdpo_jax.checkpoints import model_folder, run_export, tensor_file
from focusdpo_jax.data import dataset, line_store
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.output_folder import OutputFolder
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary
from focusdpo_jax.training import encoding_cache, loop, models, runs, writers
from focusdpo_jax.training.checkpointing import Checkpoints
from focusdpo_jax.visualization import grids

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@contextlib.contextmanager
def full(limit=64):
    """While it is open, no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left(folder):
    """Names of the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "number, words",
    [(28, "No space left on device"), (122, "Disk quota exceeded"), (27, "File too large")],
)
def test_errors_have_the_systems_message(number, words, tmp_path, monkeypatch):
    def replace(path, target):
        raise OSError(number, os.strerror(number))

    (tmp_path / "a.json").write_text("before")
    monkeypatch.setattr(type(files.epath.Path("a")), "replace", replace)
    with pytest.raises(
        UserError,
        match=rf"a.json cannot be written \({words}\); make room and run the same "
        "command again",
    ):
        files.replace_file(tmp_path / "a.json", "after")
    assert left(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "before"


def test_other_errors_are_unchanged(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        files.replace_file(tmp_path / "file" / "a.json", "{}")
    assert files.no_room(ValueError("RESOURCE_EXHAUSTED: out of memory")) is None


def a_tokenizer(folder):
    write_vocabulary(folder, ["a", "star"])
    return Tokenizer(folder, 16)


WRITERS = {
    "a.json": lambda folder: files.replace_file(folder / "a.json", "x" * 100),
    "a.safetensors": lambda folder: tensor_file.write(folder / "a.safetensors", {"a": NOISE}),
    "unet.safetensors": lambda folder: model_folder.save_part(folder, "unet", {"a": NOISE}),
    "a.zip": lambda folder: line_store._write(
        folder / "a.zip", {"chosen": NOISE, "subjects": []}, {}
    ),
    "a.png": lambda folder: grids.save_png(folder / "a.png", NOISE),
    "scores/base/clip/000000.json": lambda folder: OutputFolder(folder).save_scores(
        "base", "clip", 0, {"a" * 100: 1.0}
    ),
    "results.json": lambda folder: OutputFolder(folder).write("results.json", {"a": "b" * 100}),
    "0000/0000001.npz": lambda folder: encoding_cache._write(
        encoding_cache._file(folder, 1), {"a": NOISE}
    ),
    "settings.json": lambda folder: OutputFolder(folder).claim({"a": "b" * 100}),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_writer_names_its_file_and_leaves_nothing(name, tmp_path):
    with (
        full(),
        pytest.raises(UserError, match=rf"{name} cannot be written \(File too large\); make room"),
    ):
        WRITERS[name](tmp_path)
    assert left(tmp_path) == []


def test_a_tokenizer(tmp_path):
    tokenizer = a_tokenizer(tmp_path / "a")
    with (
        full(),
        pytest.raises(UserError, match=r"b/.*\.(json|txt) cannot be written \(File too large\)"),
    ):
        tokenizer.save(tmp_path / "b")
    assert left(tmp_path / "b") == []


def test_metrics(tmp_path, monkeypatch):
    """The writers' thread meets the full disk; the run gets its error at a later call, or at a flush."""
    monkeypatch.setattr(writers.TensorBoardWriter, "write_scalars", lambda *_: None)
    with full():
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(File too large\)"):
            with writers.open_writer(tmp_path) as writer:
                writer.write_scalars(1, {"loss": 1.0})
                writer.flush()
                for step in range(2, 50):
                    writer.write_scalars(step, {"loss": 1.0})
    # The next start removes the incomplete checkpoint.
    writers.JsonLinesWriter(tmp_path, start_step=5).close()
    kept = tiny.losses(tmp_path)
    assert kept == {1: 1.0, 2: 1.0}
    assert left(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("ends", ["flush", "the end of the body"])
def test_events(tmp_path, ends):
    pytest.importorskip("tensorboard")
    later = []
    with (
        full(500),
        pytest.raises(
            UserError, match=r"events.out.tfevents.*cannot be written \(File too large\)"
        ),
        writers.open_writer(tmp_path) as writer,
    ):
        writer.write_images(1, {"samples": NOISE})
        if ends == "flush":
            writer.flush()
            later.append("not reached")
    assert not later


def test_a_checkpoint_on_a_full_disk_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": np.zeros(10, np.float32)}, {"next_index": 1})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    state = jax.numpy.asarray(np.random.default_rng(0).normal(size=10**5))
    with (
        full(50_000),
        pytest.raises(
            UserError,
            match=(
                r"cannot write a checkpoint in .*checkpoints \(File too large\). The last complete one is of "
                "step 1; make room and run the same command again"
            ),
        ),
    ):
        checkpoints.save(2, {"a": state}, {"next_index": 2})
        checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_toybox(tiny_config, tmp_path):
    config = tiny_config(data__train_size=40)
    sizes = {"train": 40, "validation": 2, "test": 4}
    with (
        full(50_000),
        pytest.raises(
            UserError,
            match=(
                r"cannot write the data set to .*data \(File too large\); make room and run the same command "
                "again"
            ),
        ),
    ):
        dataset.build_toybox(tmp_path / "data", dataset.toybox_world(config), sizes)
    assert left(tmp_path) == []
    path = dataset.build_toybox(tmp_path / "data", dataset.toybox_world(config), sizes)
    assert len(dataset.open_source(path, "train")) == 40


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    loop.run(tiny.tiny_config(tiny_folder, steps=2, evaluation__pictures=0), folder)
    return folder


def test_a_model_on_a_full_disk_is_not_a_model(finished, tiny_config, tmp_path):
    """The run resumes from its checkpoint, which other commands read meanwhile."""
    model = models.load_model(tiny_config())
    expected = runs.Run(finished).policy().parameters["unet"]["conv_out"]["kernel"]
    (tmp_path / "run").mkdir()
    for name in ("config.json", "checkpoints", "model"):
        os.system(f"cp -r {finished / name} {tmp_path / 'run'}")
    with (
        full(10_000),
        pytest.raises(UserError, match=r"model/.*cannot be written \(File too large\)"),
    ):
        models.save_model(tmp_path / "run" / "model", model, model.parameters, step=2)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run/model/model.json").exists()
    found = runs.Run(tmp_path / "run").policy().parameters["unet"]["conv_out"]["kernel"]
    np.testing.assert_array_equal(found, expected)


def test_an_export(finished, tmp_path):
    with (
        full(1000),
        pytest.raises(
            UserError, match=r"ip_adapter.safetensors cannot be written \(File too large\)"
        ),
    ):
        run_export.export_run(finished, tmp_path / "out")
    assert left(tmp_path) == []


def test_a_sample(tmp_path):
    from absl.testing import flagsaver

    from focusdpo_jax.inference.prompts import Prompt

    if not sample.flags.FLAGS.is_parsed():
        sample.flags.FLAGS(sys.argv[:1])
    with (
        flagsaver.flagsaver(output=str(tmp_path / "a.png")),
        full(),
        pytest.raises(UserError, match=r"a.png cannot be written \(File too large\); make room"),
    ):
        sample.write([Prompt("a star", (), 0)], [NOISE], None, {})
    assert left(tmp_path) == []


@pytest.mark.parametrize("limit, file", [(1500, "vocab.json"), (60_000, "model/|checkpoint")])
def test_a_run_ends_with_one_line_and_resumes(limit, file, finished, tiny_folder, tmp_path):
    config = tiny_folder / "tiny_full.py"
    tests = os.path.dirname(tiny.__file__)
    config.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {tests!r})\nimport tiny\n"
        f"def get_config():\n    return tiny.tiny_file_config(pathlib.Path({str(tiny_folder)!r}), "
        "steps=2, evaluation__pictures=0)\n"
    )
    script = (
        f"import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_module('focusdpo_jax.main', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "main", f"--config={config}", f"--workdir={tmp_path}/run"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    told = [line for line in result.stderr.splitlines() if line[:1] not in "IW"]
    assert result.returncode == 2 and len(told) == 1, result.stderr
    assert told[0].startswith("error: ") and "(File too large)" in told[0], told
    assert any(name in told[0] for name in file.split("|")), told
    assert not [name for name in left(tmp_path) if "tmp" in name or name.endswith("run.lock")]
    loop.run(tiny.tiny_config(tiny_folder, steps=2, evaluation__pictures=0), tmp_path / "run")
    assert tiny.losses(tmp_path / "run") == tiny.losses(finished)
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text())["step"] == 2
