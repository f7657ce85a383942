"""Shipped models are in float16 and load as before."""

import shutil

import numpy as np
import pytest

from experiments import toybox_ship
from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.parameters import flatten
from focusdpo_jax.training import runs


def test_a_shipped_model_is_half_as_large_and_loads_in_float32(tiny_folder, tmp_path):
    source, folder = tiny_folder / "model", tmp_path / "shipped"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "file").write_text("of the model before")
    size = toybox_ship.ship(source, folder)

    assert size == sum(path.stat().st_size for path in folder.rglob("*") if not path.is_dir())
    names = [path.name for path in source.glob("*.safetensors")]
    assert sorted(names) == sorted(path.name for path in folder.glob("*.safetensors"))
    before, after = (sum((f / n).stat().st_size for n in names) for f in (source, folder))
    assert after < 0.6 * before
    assert not (folder / "old").exists()

    expected = flatten(runs.load_folder(source).parameters)
    shipped = flatten(runs.load_folder(folder).parameters)
    assert shipped.keys() == expected.keys()
    for path, value in shipped.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, np.float32(np.float16(expected[path])))


def test_values_beyond_float16_are_refused(tiny_folder, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny_folder / "model", source)
    tensors, _ = tensor_file.read(source / "adapter.safetensors")
    values = {name: np.array(tensor) for name, tensor in tensors.items()}
    name = min(values)
    values[name] = values[name] + 1e6
    tensor_file.write(source / "adapter.safetensors", values)
    with pytest.raises(UserError, match=f"{name} has values that float16 cannot hold"):
        toybox_ship.ship(source, tmp_path / "shipped")
