"""Reads and writes safetensors files one tensor at a time.

The format (github.com/huggingface/safetensors) is the header's length in eight bytes, the header in
JSON, and the bytes of the tensors. `safe_open` of the library maps the file into memory: its pages
count as used until it is closed, so that loading takes twice the size of the file. This reader
holds one tensor besides those that it has returned, and supports every path that `epath` opens.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from focusdpo_jax import file_kinds
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import new_file
from focusdpo_jax.models import stacking
from focusdpo_jax.models.parameters import Params, Path, flatten

_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(value): name for name, value in _TYPES.items()}
# The library's limit; a file with a longer header is damaged.
_LONGEST_HEADER = 100_000_000


class LazyTensor:
    """A tensor of known shape and type whose values are read by `np.asarray`.

    Every `np.asarray` reads the values again; nothing is cached.

    Attributes:
      shape: shape of the tensor.
      dtype: numpy type of the tensor.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[], np.ndarray]):
        """Creates a tensor.

        Args:
          shape, dtype: shape and type of the result of `read`.
          read: returns the values.
        """
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._read = read

    @classmethod
    def of(cls, value: "np.ndarray | LazyTensor") -> "LazyTensor":
        """Wraps a numpy array; returns a `LazyTensor` unchanged."""
        if isinstance(value, LazyTensor):
            return value
        return cls(value.shape, value.dtype, lambda: value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        """Returns the tensor after `function`, which is applied when the values are read."""
        # Infers the shape with a broadcast scalar, which needs no memory.
        shape = function(np.broadcast_to(np.zeros((), self.dtype), self.shape)).shape
        return LazyTensor(shape, self.dtype, lambda: function(self._read()))


def read(path: epath.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Opens a safetensors file; only the header is read.

    Returns:
      {name: LazyTensor}, and the metadata of the file.

    Raises:
      UserError: the file is missing, or not a complete safetensors file.
    """
    path = epath.Path(path)
    try:
        size = path.stat().length
        with path.open("rb") as file:
            head = file.read(512)
            length = int.from_bytes(head[:8], "little")
            # Recognise other formats first: their first bytes could be a length.
            if len(head) < 8 or not 2 <= length <= _LONGEST_HEADER or head[8:9] not in (b"{", b""):
                what = file_kinds.describe(head) or (
                    f"is not a safetensors file (its first bytes are {head[:8]!r}, and not the "
                    "length of a header): fetch the .safetensors file of the model"
                )
                raise UserError(f"{path} {what}.")
            if size < 8 + length:
                raise ValueError(
                    f"it has {size} bytes and should have more than the {8 + length} of its header"
                )
            file.seek(8)
            header = json.loads(file.read(length).decode())
        metadata = header.pop("__metadata__", None) or {}
        tensors, end = {}, 8 + length
        for name, entry in header.items():
            tensors[name] = _entry(path, name, entry, 8 + length)
            end = max(end, 8 + length + entry["data_offsets"][1])
        if size != end:
            raise ValueError(f"it has {size} bytes and should have {end}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}). It is damaged or "
            "incomplete: fetch or copy it again."
        ) from error
    return tensors, metadata


def _entry(path: epath.Path, name: str, entry: Mapping[str, Any], start: int) -> LazyTensor:
    """Returns the tensor of one entry of a header; `start` is the offset of the data."""
    if entry["dtype"] not in _TYPES:
        raise UserError(
            f"{path}: {name} is of the type {entry['dtype']}, which is not supported; give a file "
            "in float32, float16 or bfloat16."
        )
    dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"the extent of {name} contradicts its shape {shape}")

    def load() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(start + begin)
            return np.frombuffer(file.read(end - begin), dtype).reshape(shape)

    return LazyTensor(shape, dtype, load)


def placement(dtype: Any = None, sharding: Any = None) -> Callable[[Path, np.ndarray], Any]:
    """Returns the argument `place` of `stacking.join`, which converts and places each leaf.

    Args:
      dtype: type of every leaf, or a tree of types; None keeps that of the file.
      sharding: sharding of every leaf, or a tree of shardings; None returns numpy arrays. Each
        process reads the whole tensor and keeps its own shards.
    """
    dtype_of, sharding_of = (
        (lambda path, value=value: value) if not isinstance(value, dict) else flatten(value).get
        for value in (dtype, sharding)
    )

    def place(path: Path, value: np.ndarray) -> Any:
        value = value if dtype_of(path) is None else value.astype(dtype_of(path))
        target = sharding_of(path)
        if target is None:
            return value
        array = jax.make_array_from_callback(value.shape, target, lambda index: value[index])
        # Asynchronous copies would keep their sources in host memory.
        return array.block_until_ready()

    return place


def load(
    opened: Mapping[Path, LazyTensor] | None,
    example: Params,
    dtype: Any = None,
    sharding: Any = None,
) -> dict[str, Any] | None:
    """Reads the tensors of an opened part, one after the other.

    Args:
      opened: {path in `stacking.split(example)`: LazyTensor}, or None.
      example: the expected tree of arrays or `jax.ShapeDtypeStruct`s.
      dtype, sharding: see `placement`.

    Returns:
      A tree like `example`; None if `opened` is None.
    """
    if opened is None:
        return None
    return stacking.join(opened, example, place=placement(dtype, sharding))


def write(
    path: epath.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file atomically, one tensor at a time.

    Args:
      path: path of the file.
      tensors: {name: numpy or jax array, or `LazyTensor`}.
      metadata: texts for the header.
    """
    path = epath.Path(path)
    # safetensors' own order, which keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), tensors[name].shape
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(np.asarray(tensors[name])).tobytes())
