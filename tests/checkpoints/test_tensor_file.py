import io
import json
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from focusdpo_jax.checkpoints import tensor_file
from focusdpo_jax.errors import UserError

TENSORS = {
    "half": np.arange(3, dtype=np.float16),
    "a": np.arange(6.0).reshape(2, 3),
    "brain": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(4, 1),
    "scalar": np.float32(7),
    "flag": np.array([True, False, True]),
    "empty": np.zeros((0, 2), np.int32),
}

EXTENT = sum(np.asarray(value).nbytes for value in TENSORS.values())


def arrays(tensors):
    return {name: np.asarray(value) for name, value in tensors.items()}


def test_the_official_library_reads_our_files(tmp_path):
    path = tmp_path / "x.safetensors"
    tensor_file.write(path, TENSORS, {"step": "3"})
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        theirs = {name: file.get_tensor(name) for name in file.keys()}
    np.testing.assert_equal(theirs, TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_reads_files_of_the_official_library(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in TENSORS.items()}, path, {"a": "b"})
    tensors, metadata = tensor_file.read(path)
    assert metadata == {"a": "b"}
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        name: (np.shape(value), np.asarray(value).dtype) for name, value in TENSORS.items()
    }
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
        (whole + b"x", f"it has {len(whole) + 1} bytes and should have {len(whole)}"),
        (
            whole[:40],
            f"it has 40 bytes and should have more than the {len(whole) - EXTENT} of its ",
        ),
        (
            whole[:8],
            f"it has 8 bytes and should have more than the {len(whole) - EXTENT} of its header",
        ),
        (len(header).to_bytes(8, "little") + header + bytes(8), "the extent of a contradicts"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=reason) as error:
            tensor_file.read(path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="nowhere.safetensors cannot be read"):
        tensor_file.read(tmp_path / "nowhere.safetensors")


def zipped():
    """A file of torch.save, which starts like any zip archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return content.getvalue()


KINDS = {
    "empty": (b"", "is empty: fetch or copy it again"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5135149760\n",
        "is a pointer of git-lfs and not the file itself: run `git lfs pull`",
    ),
    "page": (b"\n<!DOCTYPE html>\n<html><head>", "is a web page: fetch the file itself"),
    "short page": (b"<html> not here", "is a web page"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(16), "is a GGUF file, whose weights are quantised"),
    "zip": (zipped(), "is a zip archive, as torch.save makes of a pickle.*weights_only=True"),
    "pickle": (
        pickle.dumps({"a": list(range(99))}, protocol=2),
        "is a Python pickle, as torch.save made them.*is not read: convert it",
    ),
    "compressed": (b"\x1f\x8b\x08" + bytes(60), "is compressed .gzip.: unpack it first"),
    "text": (
        b"Not Found. Please try again later.",
        r"is not a safetensors file \(its first bytes are b'Not",
    ),
    "json": (json.dumps({"weight_map": {"a": "b"}}).encode(), "is not a safetensors file"),
    "few bytes": (b"abc", "is not a safetensors file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_are_recognised(kind, tmp_path):
    content, message = KINDS[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.safetensors {message}") as error:
        tensor_file.read(path)
    assert "\n" not in str(error.value) and "damaged" not in str(error.value)


@pytest.mark.parametrize("length", [0x0280, 0x0580, 0x8B1F])
def test_a_header_whose_length_looks_like_another_file(length, tmp_path):
    """A valid header length may equal the first bytes of a pickle or of gzip."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.float32(7).tobytes())
    assert arrays(tensor_file.read(path)[0]) == {"a": [7]}


def test_types_that_are_not_read_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(
        UserError, match="x.safetensors: a is of the type F4, which is not supported"
    ):
        tensor_file.read(path)
