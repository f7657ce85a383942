"""Our side of `step.py`.

step_ours.py CASE FOLDER DTYPE REMAT
"""

import pathlib
import pickle
import sys
import time
from typing import Any

from focusdpo_jax import command

command.keep_compiled_programs()  # Before jax is imported, as in a run.
command.keep_memory()

import jax
import numpy as np
from step import peak_memory, reset_peak_memory, serve
from step_inputs import PARTS, configuration, make_objective

from focusdpo_jax.checkpoints import pytorch_names, tensor_file
from focusdpo_jax.models.generator import Generator, split_parameters
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import rules
from focusdpo_jax.training import assembly, models
from focusdpo_jax.training.state import create_state, make_optimizer
from focusdpo_jax.training.step import StepDefinition, compile_step


def load(config: Any, sizes: Any, folder: pathlib.Path, mesh):
    """Loads the parameters {part: tree}, with the dtypes of a run."""
    parameters = {}
    for part in PARTS:

        def place(path, value, part=part):
            path = (part, *path)
            return jax.device_put(
                np.asarray(value, models.stored_type(config, path, value.shape)),
                rules.parameter_sharding(path, value.shape, mesh),
            )

        shape = jax.eval_shape(
            lambda part=part: Generator(sizes).init_part(part, jax.random.key(0))
        )
        parameters[part] = pytorch_names.to_flax(
            tensor_file.read(folder / f"{part}.safetensors")[0], shape, place=place
        )
    return parameters


def make(case, folder: pathlib.Path, dtype: str, remat: bool):
    """Returns the function that runs the next step."""
    config, sizes = configuration(case, dtype, remat)
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size, jax.devices()[:1])
    buckets = assembly.focus_buckets(config)
    ((structure, params),) = buckets.values()
    objective = make_objective(config, sizes)
    trainable, frozen = split_parameters(load(config, sizes, folder, mesh), config.trainable)
    reference = assembly.reference_parameters(trainable, dtype, mesh)
    definition = StepDefinition(
        reference_pass=objective.reference_pass,
        loss=objective.loss,
        buckets=buckets,
        frozen={"parameters": frozen, "reference": reference},
        mesh=mesh,
    )
    optimizer = make_optimizer(config)
    current = {"state": create_state(trainable, optimizer, 0.0), "number": 0}
    pairs = meshes.shard_batch(pickle.loads((folder / "pairs.pickle").read_bytes()), mesh)
    compiled = compile_step(definition, optimizer, current["state"], pairs, seed=config.seed)

    def step():
        start = time.perf_counter()
        state, metrics = compiled(
            structure, current["state"], definition.frozen, pairs, params, current["number"]
        )
        loss = metrics.compute()["loss"]
        jax.block_until_ready(state)
        current.update(state=state, number=current["number"] + 1)
        return time.perf_counter() - start, loss

    return step


def main() -> None:
    """Answers the requests of `step.py`."""
    case, folder, dtype, remat = sys.argv[1:]
    device = jax.devices()[0]
    on_host = device.platform == "cpu"

    def memory():
        return peak_memory() if on_host else device.memory_stats()["peak_bytes_in_use"]

    serve(
        lambda: make(case, pathlib.Path(folder), dtype, remat == "1"),
        memory,
        reset_peak_memory if on_host else lambda: None,
    )


if __name__ == "__main__":
    main()
