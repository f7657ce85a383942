"""The table of a run's parameters."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import overview


def test_every_array_has_a_row_with_its_sharding(tmp_path, caplog):
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 1, jax.devices()[:1])
    kernel = jax.ShapeDtypeStruct(
        (4, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    # Leaves of any pytree, not only of dicts.
    frozen = {"unet": {"bias": jnp.zeros(8, jnp.bfloat16)}, "empty": (jnp.zeros(2), None)}
    with caplog.at_level("INFO", logger="absl"):
        overview.write(tmp_path, {"unet": {"kernel": kernel}}, frozen)
    lines = (tmp_path / "parameters.txt").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert cells[0] == ["Name", "Shape", "Dtype", "Size", "Sharding"]
    rows = {name: rest for name, *rest in cells[1:]}
    assert list(rows) == ["frozen/empty/0", "frozen/unet/bias", "trainable/unet/kernel"]
    assert rows["trainable/unet/kernel"] == ["(4, 256)", "float32", "1,024", "(None, 'fsdp')"]
    assert rows["frozen/unet/bias"][:3] == ["(8,)", "bfloat16", "8"]
    assert lines[-1] == "Total: 1,034 -- 4,120 bytes"
    assert caplog.messages == [
        "trainable: 0.00 M parameters in 1 arrays, 4.1e-06 GB; frozen: 0.00 M parameters in 2 arrays, "
        f"2.4e-08 GB; each array is listed in {tmp_path}/parameters.txt"
    ]
