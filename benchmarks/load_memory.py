"""Peak host memory of reading a weight file into jax arrays, compared with the file's size.

    python benchmarks/load_memory.py [GB]

The file has dense and convolution kernels with SDXL's larger shapes in bfloat16, 5 GB by default.
It is a sparse file of zeros, which takes no space on most file systems. The memory of the process
before reading (Python, jax) is subtracted. Arrays stay on the CPU, in host memory.
"""

import json
import os
import resource
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from focusdpo_jax.checkpoints import pytorch_names, tensor_file  # noqa: E402

SHAPES = [(1280, 10240), (5120, 1280), (3, 3, 1280, 1280), (3, 3, 2560, 1280), (1280, 1280)]


def peak():
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(gigabytes: float = 5.0) -> None:
    """Prints size, peak memory and their ratio."""
    example, size = {}, 0
    while size < gigabytes * 1e9:
        shape = SHAPES[len(example) % len(SHAPES)]
        leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        example[f"layers_{len(example)}"] = {"kernel": leaf}
        size += 2 * leaf.size
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        write_sparse(path, example)
        place = tensor_file.placement(
            jnp.bfloat16, jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        before = peak()
        tensors, _ = tensor_file.read(path)
        params = pytorch_names.to_flax(tensors, example, path, place)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        used = peak() - before
    print(f"{held / 1e9:.2f} GB read, peak {used / 1e9:.2f} GB: {used / held:.3f} of its size")


def write_sparse(path: str, example) -> None:
    """Writes a sparse safetensors file of zeros with the tensors of `example`."""
    header, position = {}, 0
    for name, layer in example.items():
        *window, inputs, outputs = layer["kernel"].shape
        end = position + 2 * layer["kernel"].size
        header[f"{name.replace('_', '.')}.weight"] = {
            "dtype": "BF16",
            "shape": [outputs, inputs, *window],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
