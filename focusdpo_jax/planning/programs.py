"""Lists the programs of a run, and the arrays on the chips while each of them runs.

The programs are the run's own functions, traced from shapes: encoding, the two programs of a step,
sampling, focus maps, and the probe.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from focusdpo_jax import compiling
from focusdpo_jax.config import RunConfig
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read
from focusdpo_jax.training import pair_batches, run_data, shapes
from focusdpo_jax.training.step import trace_step

# Without a device XLA cannot tune the tile sizes of its Triton kernels for matrix products, and
# fails for some of them. This option selects cuBLAS instead.
_ON_ABSENT_GPU = {"xla_gpu_enable_triton_gemm": False}
# In the order of compilation: first those that most often determine whether a run fits.
NAMES = ("update", "sampling", "encoding", "reference pass", "focus maps", "probe")


@dataclasses.dataclass(frozen=True)
class RunProgram:
    """One program of a run.

    Attributes:
      name: one of `NAMES`.
      when: when a run executes it, such as "of every batch".
      trace: () -> `jax.stages.Traced`.
      held: {kind: tree of shapes with shardings} of all arrays on the chips while it runs,
        including its arguments.
      options: compiler options.
      field: field of the configuration that sets the number of rows.
      rows: number of rows of its inputs.
      rows_per_chip: number of these rows on each chip.
    """

    name: str
    when: str
    trace: Callable[[], jax.stages.Traced]
    held: Mapping[str, Any]
    options: Mapping[str, Any]
    field: str
    rows: int
    rows_per_chip: int


def run_programs(
    config: RunConfig, mesh: Mesh
) -> tuple[dict[str, RunProgram], list[Callable[[], jax.stages.Traced]]]:
    """Returns ({name: RunProgram}, [function that traces a reference pass, for each structure]).

    A run may have several reference passes and focus map programs. The ones with most terms
    represent all of them, since they only differ after the reference model's forward pass, which
    takes most memory.

    Args:
      config: a `RunConfig` with a generator's objective.
      mesh: device mesh; its devices may be absent.
    """
    step = shapes.abstract_step(config, mesh)
    assembly, definition = step.assembly, step.assembly.definition
    passes, update = trace_step(
        definition,
        step.optimizer,
        step.state,
        step.batch,
        step.key,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )
    fullest = max(passes, key=lambda structure: sum(dataclasses.astuple(structure.weight)))
    frozen = definition.frozen
    resident = {
        "frozen parameters": (frozen["parameters"], frozen.get("unconditional", ())),
        "encoders": step.encoders,
        "reference": frozen.get("reference", {}),
        "trained parameters": (step.state.trainable, step.state.average),
        "optimizer": step.state.optimizer,
        # The current batch, and the next one, which is prefetched.
        "batch": (step.batch, step.batch),
    }
    sampling = resident | {"encoders": step.others}
    platform = mesh.devices.flat[0].platform
    networks = compiling.network_options(platform)
    result: dict[str, RunProgram] = {}
    shares = math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES)

    absent = platform == "gpu" and mesh.devices.flat[0] not in jax.devices()

    def add(
        name: str,
        when: str,
        trace: Callable[[], jax.stages.Traced],
        held: Mapping[str, Any],
        field: str,
        rows: int,
        options: Mapping[str, Any] = networks,
    ) -> None:
        result[name] = RunProgram(
            name,
            when,
            trace,
            held,
            {**options, **(_ON_ABSENT_GPU if absent else {})},
            field,
            rows,
            rows // shares if rows % shares == 0 else rows,
        )

    add("update", "of every batch", update, resident, "batch_size", config.batch_size)
    add(
        "reference pass",
        "of every batch",
        passes[fullest],
        resident,
        "batch_size",
        config.batch_size,
    )

    # Encoding runs once over the data before training, or for every batch; and for sampled scenes.
    evaluated, encode = config.evaluation.batch_size, assembly.encode
    if config.data.cache:
        encode = pair_batches.encoder_to_keep(config, assembly)
        size = config.data.train_size if config.data.source == "toybox" else evaluated
        rows = run_data.encoding_batch_size(config, range(size), mesh)
        add(
            "encoding",
            "once over the data",
            functools.partial(_trace_encoding, config, mesh, step, encode, rows),
            sampling | {"batch": {}, "inputs": _raw(config, mesh, step, rows)},
            "evaluation.batch_size",
            rows,
        )
    else:
        rows = config.batch_size
        add(
            "encoding",
            "of every batch",
            functools.partial(_trace_encoding, config, mesh, step, encode, rows),
            resident | {"batch": step.batch, "inputs": _raw(config, mesh, step, rows)},
            "batch_size",
            rows,
        )

    scenes = (
        max(config.evaluation.scenes, config.evaluation.validation_scenes)
        if config.data.source == "toybox"
        else 0
    )
    if config.evaluation.pictures or scenes:
        inputs = _sampler_inputs(config, mesh, step)
        add(
            "sampling",
            "of every sample",
            functools.partial(_trace_sampling, config, mesh, step, inputs),
            sampling | {"inputs": inputs},
            "evaluation.batch_size",
            evaluated,
        )
    if config.evaluation.pictures:
        rows = config.evaluation.pictures
        pairs = meshes.placed_shapes(_encoded(config, step, rows), _rows_sharding(mesh, rows))
        add(
            "focus maps",
            "of every sample",
            functools.partial(_trace_maps, mesh, step, fullest, pairs),
            resident | {"inputs": pairs},
            "evaluation.pictures",
            rows,
            compiling.FAST_TO_COMPILE,
        )
    if scenes:
        side = config.resolution
        pixels = jax.ShapeDtypeStruct((evaluated, side, side, 3), jnp.float32)
        probe = Probe(TOYBOX)
        weights = jax.eval_shape(probe.init, jax.random.key(0), pixels)["params"]
        one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
        arguments = meshes.placed_shapes((weights, pixels), one)
        add(
            "probe",
            "at the end",
            lambda: jax.jit(lambda p, x: read(cast(Any, probe.apply({"params": p}, x)))).trace(
                *arguments
            ),
            resident | {"inputs": arguments},
            "evaluation.batch_size",
            evaluated,
            {},
        )
    return {name: result[name] for name in NAMES if name in result}, list(passes.values())


def _first_of(buckets: Mapping[str, Any], structure: Any) -> str:
    return next(name for name, (other, _) in buckets.items() if other == structure)


def _rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Returns the sharding that `meshes.shard_rows` uses for this number of rows."""
    shares = math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES)
    return meshes.replicated(mesh) if rows % shares else meshes.batch_sharding(mesh)


def _raw(config: RunConfig, mesh: Mesh, step: Any, rows: int) -> Any:
    return meshes.placed_shapes(
        shapes.raw_batch(config, step.assembly.generator, rows), _rows_sharding(mesh, rows)
    )


def _at_start(step: Any) -> Any:
    """Returns the parameters that encoding reads."""
    return step.assembly.initial_parameters()


def _encoded(config: RunConfig, step: Any, rows: int) -> Any:
    """Returns the EncodedPairs of `rows` scenes as shapes."""
    return jax.eval_shape(
        step.assembly.encode,
        _at_start(step),
        shapes.raw_batch(config, step.assembly.generator, rows),
    )


def _sampler_inputs(config: RunConfig, mesh: Mesh, step: Any) -> Any:
    """Returns the sampler's arguments after the parameters, as shapes."""
    rows = config.evaluation.batch_size
    scenes = _encoded(config, step, rows)
    noise = jax.ShapeDtypeStruct(
        (rows, *step.assembly.generator.latent_shape(config.resolution)), jnp.float32
    )
    return meshes.placed_shapes(
        (scenes.token_ids, scenes.time_ids, scenes.references, scenes.present, noise),
        _rows_sharding(mesh, rows),
    )


def _unjitted(function: Any) -> Callable[..., Any]:
    """Returns the function inside `jax.jit`, whose options are for this machine's devices."""
    return function.__wrapped__


def _trace_encoding(
    config: RunConfig, mesh: Mesh, step: Any, encode: Callable[..., Any], rows: int
) -> jax.stages.Traced:
    with trace_context(mesh):
        return jax.jit(_unjitted(encode)).trace(_at_start(step), _raw(config, mesh, step, rows))


def _trace_sampling(config: RunConfig, mesh: Mesh, step: Any, inputs: Any) -> jax.stages.Traced:
    generate = make_generate(
        step.assembly.generator,
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        negative_token_ids=step.empty,
    )
    parameters = step.assembly.all_parameters(step.state.evaluated)
    with trace_context(mesh):
        return jax.jit(_unjitted(generate)).trace(parameters, *inputs)


def _trace_maps(mesh: Mesh, step: Any, structure: Any, pairs: Any) -> jax.stages.Traced:
    definition = step.assembly.definition
    params = definition.buckets[_first_of(definition.buckets, structure)][1]
    with trace_context(mesh):
        return jax.jit(step.assembly.step.focus_maps, static_argnums=0).trace(
            structure,
            definition.pass_inputs(step.state.evaluated),
            pairs,
            params,
            step.key,
        )
