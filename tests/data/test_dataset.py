import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from focusdpo_jax import toybox
from focusdpo_jax.data import dataset, preference_pairs
from focusdpo_jax.errors import UserError

WORLD = toybox.World(seed=1, resolution=32)
SIZES = {"train": 6, "validation": 2, "test": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return dataset.build_toybox(tmp_path_factory.mktemp("data"), WORLD, SIZES)


@pytest.mark.parametrize("split", toybox.SPLITS)
def test_stored_records_equal_rendered_ones(path, split):
    stored = dataset.open_source(path, split)
    rendered = dataset.ToyboxSource(WORLD, split, SIZES[split])
    assert len(stored) == len(rendered) == SIZES[split]
    for index in range(len(stored)):
        a, b = stored[index], rendered[index]
        subjects = zip(a.pop("subjects"), b.pop("subjects"), strict=True)
        for x, y in [(a, b), *subjects]:
            assert x.keys() == y.keys()
            for key, value in y.items():
                if isinstance(value, np.ndarray):
                    assert x[key].dtype == value.dtype
                    np.testing.assert_array_equal(x[key], value)
                else:
                    assert x[key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_records_are_written_in_the_same_order_by_every_process(path):
    """A map of a protocol buffer has an order that changes from process to process."""
    (file,) = path.glob("*-train.array_record*")
    reader = array_record_module.ArrayRecordReader(str(file))
    records = [reader.read([i])[0] for i in range(reader.num_records())]
    assert len(records) == SIZES["train"]
    for record in records:
        example = tf_example_pb2.Example.FromString(record)
        assert record == example.SerializeToString(deterministic=True)


def test_second_build_reuses_the_first(path):
    before = path.stat().mtime
    assert dataset.build_toybox(path.parent.parent.parent, WORLD, SIZES) == path
    assert path.stat().mtime == before


def test_a_set_that_another_process_finishes_first_is_used(path, tmp_path, monkeypatch):
    def finish(self, **_):
        shutil.copytree(path, tmp_path / path.relative_to(path.parent.parent.parent))
        raise FileExistsError("Destination already exists")

    monkeypatch.setattr(preference_pairs.PreferencePairs, "download_and_prepare", finish)
    built = dataset.build_toybox(tmp_path, WORLD, SIZES)
    assert len(dataset.open_source(built, "train")) == SIZES["train"]


def test_other_settings_go_to_another_directory(path):
    data_dir = path.parent.parent.parent
    other = dataset.build_toybox(data_dir, toybox.World(seed=2, resolution=32), {"train": 1})
    assert other != path
    assert len(dataset.open_source(other, "train")) == 1
    assert dataset.open_source(path, "train").settings["seed"] == 1
    assert dataset.open_source(other, "train").settings["seed"] == 2


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_build_and_read_without_tensorflow(tmp_path):
    result = run(
        """
      import importlib.util, sys
      from importlib.machinery import PathFinder

      class NoTensorFlow(PathFinder):  # Still finds the metadata of distributions.
        @classmethod
        def find_spec(cls, name, path=None, target=None):
          absent = name.split('.')[0] == 'tensorflow'
          return None if absent else PathFinder.find_spec(name, path, target)

      sys.meta_path[:] = [NoTensorFlow if f is PathFinder else f for f in sys.meta_path]
      assert importlib.util.find_spec('tensorflow') is None

      from focusdpo_jax import toybox
      from focusdpo_jax.data import dataset
      path = dataset.build_toybox(sys.argv[1], toybox.World(resolution=32), {'train': 2})
      print(dataset.open_source(path, 'train')[1]['caption'])
      """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == toybox.World(resolution=32).record("train", 1)["caption"]


def test_killed_build_leaves_nothing_that_reads_as_a_data_set(tmp_path):
    result = run(
        """
      import os, sys
      from focusdpo_jax import toybox
      from focusdpo_jax.data import dataset

      class Killed(dataset.ToyboxSource):
        def __getitem__(self, index):
          if index == 3:
            os._exit(9)
          return super().__getitem__(index)

      dataset.ToyboxSource = Killed
      dataset.build_toybox(sys.argv[1], toybox.World(seed=1, resolution=32), {'train': 5})
      """,
        tmp_path,
    )
    assert result.returncode == 9, result.stderr
    assert list(tmp_path.rglob("incomplete*"))  # It was in the middle of writing.
    assert not list(tmp_path.rglob("1.0.0"))
    path = dataset.build_toybox(tmp_path, WORLD, {"train": 5})
    assert len(dataset.open_source(path, "train")) == 5
    assert dataset.open_source(path, "train")[4]["index"] == 4


def test_corrupt_file_is_named(path, tmp_path):
    broken = tmp_path / "1.0.0"
    broken.mkdir()
    for file in path.iterdir():
        content = bytearray(file.read_bytes())
        if "-test.array_record" in file.name:
            middle = len(content) // 2
            content[middle : middle + 2000] = b"\x5a" * 2000
        (broken / file.name).write_bytes(content)
    source = dataset.open_source(broken, "test")
    with pytest.raises(
        UserError, match=r"record \d of .*1\.0\.0/.*-test\.array_record.* is corrupt"
    ):
        for index in range(len(source)):
            source[index]
    assert dataset.open_source(broken, "train")[0]["caption"]  # The other files are sound.


def test_unfit_record_stops_the_build(tmp_path):
    class Unfit(dataset.ToyboxSource):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            if index == 2:
                record["rejected"] = record["chosen"]
            return record

    with pytest.raises(UserError, match="record 2: rejected equals chosen"):
        dataset.build(tmp_path, "unfit", {"train": Unfit(WORLD, "train", 4)}, {}, max_subjects=3)
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_user_mistakes_are_named(path, tmp_path):
    with pytest.raises(UserError, match="no data set at"):
        dataset.open_source(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no split 'dev'; it has"):
        dataset.open_source(path, "dev")
    with pytest.raises(UserError, match="'train' is 0"):
        dataset.build_toybox(tmp_path, WORLD, {"train": 0})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot write the data set"):
        dataset.build_toybox(file / "below", WORLD, {"train": 1})


def test_every_module_that_renders_is_in_the_fingerprint(monkeypatch, tmp_path):
    """A change of the renderer's source gives another data set, so that old images are never read."""
    imported = run(
        """
      import sys
      import focusdpo_jax.toybox
      print(*(m.split('.')[2] for m in sys.modules if m.startswith('focusdpo_jax.toybox.')))
      """
    ).stdout.split()
    assert sorted(imported) == sorted(dataset._WORLD)
    folder = tmp_path / "toybox"
    shutil.copytree(pathlib.Path(toybox.__file__).parent, folder)
    monkeypatch.setattr(toybox, "__file__", str(folder / "__init__.py"))
    before = dataset._world_fingerprint()
    for name in dataset._WORLD:
        source = (folder / f"{name}.py").read_bytes()
        (folder / f"{name}.py").write_bytes(source + b"\n")
        assert dataset._world_fingerprint() != before, name
        (folder / f"{name}.py").write_bytes(source)
