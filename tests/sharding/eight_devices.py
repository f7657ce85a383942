"""Five steps of a tiny run on several meshes of virtual devices; a program of its own, since the
number of devices is fixed when jax starts.

    python eight_devices.py FOLDER MESH...

FOLDER is a `tiny_folder`; a MESH is data x fsdp x tensor, such as 2x2x2. Prints one JSON object.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import tiny
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from focusdpo_jax.profiling import collectives
from focusdpo_jax.sharding import attention
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import builders
from focusdpo_jax.training.checkpointing import Checkpoints
from focusdpo_jax.training.state import create_state, make_optimizer
from focusdpo_jax.training.step import compile_step


def make(folder, mesh):
    """The task of the tiny run on a mesh such as "2x2x2", its optimiser and its first state."""
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), map(int, mesh.split("x"))))
    # The anchor would make the loss cross zero, where relative differences mean nothing.
    config = tiny.tiny_config(
        folder,
        batch_size=8,
        steps=5,
        trainable="full",
        anchor=0.0,
        beta=30.0,  # More of it magnifies the errors' rounding.
        data__train_size=16,
        evaluation__pictures=1,
        # One structure, with all maps: every mesh compiles each.
        focus__buckets=1,
        **sizes,
    )
    task, optimizer = builders.make_task(config, epath.Path(folder)), make_optimizer(config)
    return task, optimizer, create_state(task.trainable, optimizer, config.ema_decay)


def train(task, optimizer, state):
    """Losses of five steps, the last state, and the step."""
    position = task.batches.get_state()
    batch = task.prepare(next(task.batches))
    task.batches.set_state(position)
    step, losses = compile_step(task.definition, optimizer, state, batch, seed=0), []
    for number in range(5):
        structure, numbers = task.definition.buckets[task.bucket_at(number)]
        batch = task.prepare(next(task.batches))
        state, metrics = step(structure, state, task.definition.frozen, batch, numbers, number)
        losses.append(metrics.compute()["loss"])
    return losses, state, step


def shardings(tree):
    """The shardings of a tree, comparable across its arrays."""
    return jax.tree.map(lambda x: x.sharding, tree)


def largest_share(state):
    """The part of the state's bytes that the fullest device holds."""
    held = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def gathers(text):
    """Gathered kernels of a program: their number, their bytes, and the bytes live at once."""
    lines = text.splitlines()
    # Integers are token ids.
    found = [
        c
        for c in collectives.read(text)
        if c.kind == "all-gather" and lines[c.line].partition(" = ")[2].startswith("f32[")
    ]
    assert "is_scheduled=true" in lines[0]
    born = {c.name: c.line for c in found}
    dies = {}
    for gather in found:
        names, last = {gather.name}, gather.line
        for number in range(gather.line + 1, len(lines)):
            value, _, operation = lines[number].partition(" = ")
            if any(f"%{name})" in operation or f"%{name}," in operation for name in names):
                last = number
                if any(f" {view}(" in operation for view in ("bitcast", "copy", "transpose")):
                    names.add(value.strip().removeprefix("%"))
        dies[gather.name] = last
    alive = [
        sum(c.size for c in found if born[c.name] <= moment < dies[c.name])
        for moment in born.values()
    ]
    return {
        "count": len(found),
        "bytes": sum(c.size for c in found),
        "largest": max(c.size for c in found),
        "alive": max(alive),
    }


def restored(folder, workdir, mesh, saved):
    """Whether a checkpoint gives another mesh the same state, bit by bit, in that mesh's shards."""
    example = make(folder, mesh)[2]
    wanted = shardings(example)
    state, _ = Checkpoints(workdir, read_only=True).restore(example)
    assert shardings(state) == wanted
    return all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(jax.device_get(state)),
            jax.tree.leaves(jax.device_get(saved)),
            strict=True,
        )
    )


def divided_attention():
    """Largest difference between attention split over a mesh and the whole.

    Batches and heads that divide among the devices and that do not; inputs on the host, and on the
    mesh in another layout than that of the split.
    """
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, 4)
    split, found = attention.by_example_and_head(mesh, jax.nn.dot_product_attention), []
    for batch, heads in ((4, 2), (3, 2), (4, 3)):
        arrays = np.random.default_rng(0).normal(size=(3, batch, 8, heads, 4)).astype(np.float32)
        whole = jax.nn.dot_product_attention(*arrays)
        by_length = NamedSharding(mesh, PartitionSpec(None, "data"))
        placed = [jax.device_put(x, by_length) for x in arrays]
        for ours in (jax.jit(split)(*arrays), jax.jit(split)(*placed), split(*placed)):
            found.append(float(abs(np.asarray(ours) - np.asarray(whole)).max()))
    return found


def main():
    """See the module."""
    folder, *meshes = sys.argv[1:]
    folder, found = pathlib.Path(folder), {"attention": divided_attention()}
    for mesh in meshes:
        task, optimizer, state = make(folder, mesh)
        before = shardings(state)
        losses, state, step = train(task, optimizer, state)
        assert shardings(state) == before
        found[mesh] = {"losses": losses, "share": largest_share(state)}
        if mesh == "1x8x1":
            found[mesh]["gathers"] = gathers(step.update.as_text())
            kernels = [x for x in jax.tree.leaves(task.trainable) if x.ndim > 1]
            found[mesh]["kernels"] = [len(kernels), sum(x.nbytes for x in kernels)]
            with tempfile.TemporaryDirectory() as workdir:
                checkpoints = Checkpoints(workdir)
                checkpoints.save(5, state, task.batches.get_state())
                checkpoints.close()
                found["restored"] = {
                    other: restored(folder, workdir, other, state) for other in ("2x1x1", "1x1x1")
                }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
