import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError

TENSORS = {"half": np.arange(3, dtype=np.float16), "a": np.arange(6.0).reshape(2, 3),
           "brain": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(4, 1), "scalar": np.float32(7),
           "flag": np.array([True, False, True]), "empty": np.zeros((0, 2), np.int32)}


def arrays(tensors):
    return {name: np.asarray(value) for name, value in tensors.items()}


def test_the_official_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS, {"step": "3"})
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        theirs = {name: file.get_tensor(name) for name in file.keys()}
    np.testing.assert_equal(theirs, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_reads_what_the_official_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in TENSORS.items()}, path, {"a": "b"})
    tensors, metadata = tensor_file.read(path)
    assert metadata == {"a": "b"}
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        name: (np.shape(value), np.asarray(value).dtype) for name, value in TENSORS.items()}
    np.testing.assert_equal(arrays(tensors), TENSORS)
    turned = tensors["a"].map(np.transpose)
    assert turned.shape == (3, 2)
    np.testing.assert_array_equal(turned, TENSORS["a"].T)


def test_reading_holds_one_tensor_besides_the_result(tmp_path):
    path, size = tmp_path / "x.safetensors", 16 * 2**20
    tensor_file.write(path, {str(i): np.zeros(2**18, np.float32) for i in range(16)})
    tracemalloc.start()
    tensors, _ = tensor_file.read(path)
    kept = {name: np.asarray(value).astype(np.float16) for name, value in tensors.items()}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(value.nbytes for value in kept.values()) == size // 2
    assert peak < size // 2 + 1.2 * 2**20


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS)
    whole = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    for damaged, reason in [
            (whole[:-1], f"it has {len(whole) - 1} bytes and should have {len(whole)}"),
            (b"<html> not here", "the length of its header makes no sense"),
            (b"", "the length of its header"), (whole[:40], "not a readable safetensors file"),
            (len(header).to_bytes(8, "little") + header + bytes(8), "the extent of a contradicts")]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=reason) as error:
            tensor_file.read(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="nowhere.safetensors cannot be read"):
        tensor_file.read(tmp_path / "nowhere.safetensors")
