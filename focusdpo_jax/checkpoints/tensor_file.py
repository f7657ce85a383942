"""safetensors files, one tensor at a time.

The format (github.com/huggingface/safetensors): the header's length in eight bytes, the header in
JSON, the tensors' bytes. It is read here and not with `safe_open`, which maps the file: its pages
count as memory until it is closed, so that a loaded file takes twice its size. This reader holds
one tensor besides what it has given, and works on every path that `epath` opens.
"""

import json
import math

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax import traverse_util

from focusdpo_jax import file_kinds
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import new_file
from focusdpo_jax.models import stacking

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
# As in safetensors: a longer header is a damaged file.
_LONGEST_HEADER = 100_000_000


class LazyTensor:
    """A tensor whose shape and type are known and whose values are read by `np.asarray`.

    Every `np.asarray` reads again; nothing is kept.
    """

    def __init__(self, shape, dtype, read):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._read = read

    @classmethod
    def of(cls, value):
        """A numpy array as a `LazyTensor`; one that already is stays what it is."""
        return value if isinstance(value, cls) else cls(value.shape, value.dtype, lambda: value)

    def __array__(self, dtype=None, copy=None):
        value = self._read()
        return value if dtype is None else value.astype(dtype)

    def map(self, function):
        """The tensor to which `function`, of numpy arrays, leads; it is called when read."""
        # A view without memory tells the shape: as_strided would do, broadcast_to is plainer.
        shape = function(np.broadcast_to(np.zeros((), self.dtype), self.shape)).shape
        return LazyTensor(shape, self.dtype, lambda: function(self._read()))


def read(path):
    """Opens a safetensors file.

    Returns:
      dict from name to `LazyTensor`, and the file's metadata, a dict of texts.

    Raises:
      UserError: it is missing, or no complete safetensors file.
    """
    path = epath.Path(path)
    try:
        size = path.stat().length
        with path.open("rb") as file:
            head = file.read(512)
            length = int.from_bytes(head[:8], "little")
            # First of all what it promises to be: the length of a header may look like anything.
            if len(head) < 8 or not 2 <= length <= _LONGEST_HEADER or head[8:9] not in (b"{", b""):
                what = file_kinds.describe(head) or (
                    f"is no safetensors file (its first bytes are {head[:8]!r}, and not the length of a "
                    "header): fetch the .safetensors file of the model"
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


def _entry(path, name, entry, start):
    """The lazy tensor of one entry of a header."""
    if entry["dtype"] not in _TYPES:
        raise UserError(
            f"{path}: {name} is of the type {entry['dtype']}, which is not read; give a file in "
            "float32, float16 or bfloat16."
        )
    dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"the extent of {name} contradicts its shape {shape}")

    def load():
        with path.open("rb") as file:
            file.seek(start + begin)
            return np.frombuffer(file.read(end - begin), dtype).reshape(shape)

    return LazyTensor(shape, dtype, load)


def placement(dtype=None, sharding=None):
    """How leaves are kept as they are read: a function of a path and a numpy array.

    Args:
      dtype: of every leaf, or a tree of types; None leaves the file's.
      sharding: of every leaf, or a tree of shardings, where jax arrays are wanted. Each process
        reads all of a tensor and keeps its own shards.

    Returns:
      The `place` of `pytorch_names.to_flax`; it converts and distributes each leaf at once.
    """
    of_type, of_sharding = (
        (lambda path, value=value: value)
        if not isinstance(value, dict)
        else traverse_util.flatten_dict(value).get
        for value in (dtype, sharding)
    )

    def place(path, value):
        value = value if of_type(path) is None else value.astype(of_type(path))
        target = of_sharding(path)
        if target is None:
            return value
        array = jax.make_array_from_callback(value.shape, target, lambda index: value[index])
        # Copies that run behind would keep their sources in host memory.
        return array.block_until_ready()

    return place


def load(opened, example, dtype=None, sharding=None):
    """Reads the tensors of an opened part, one after the other.

    Args:
      opened: {path in `stacking.split(example)`: LazyTensor}, or None.
      example: the tree expected, of arrays or `jax.ShapeDtypeStruct`s.
      dtype, sharding: see `placement`.

    Returns:
      A tree like `example`; None where nothing was opened.
    """
    if opened is None:
        return None
    return stacking.join(opened, example, place=placement(dtype, sharding))


def write(path, tensors, metadata=None):
    """Writes arrays or `LazyTensor`s, one at a time, under a temporary name that is then changed.

    Args:
      tensors: dict from name to array; what has no shape of its own is taken as it is.
      metadata: dict of texts.
    """
    path = epath.Path(path)
    # safetensors' own order, which keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header, position = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
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
