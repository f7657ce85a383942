"""Assembles a generator's training step from arrays or from shapes.

Runs, memory checks, plans for absent machines, and benchmarks share this code.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from focusdpo_jax import objectives
from focusdpo_jax.focus.buckets import make_buckets
from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import Generator, merge_parameters, split_parameters
from focusdpo_jax.models.parameters import flatten, unflatten
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.sharding import rules
from focusdpo_jax.sharding.trace_context import trace_context
from focusdpo_jax.training import encoding
from focusdpo_jax.training.generator_step import GeneratorStep, StepStructure
from focusdpo_jax.training.sources import make_source
from focusdpo_jax.training.step import StepDefinition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """A generator's step with its parameters: trees of arrays, or of shapes with shardings.

    Attributes:
      generator: a Generator.
      source: the source of SPAF's similarity (`training.sources`), or None.
      encode: (parameters, PreferenceBatch) -> EncodedPairs, jitted.
      step: the GeneratorStep.
      trainable: the trainable parameters.
      untrained: all other loaded parameters, {part: tree}; the step reads those of `step.parts`.
      definition: the StepDefinition.
    """

    generator: Generator
    source: Any
    encode: Callable
    step: GeneratorStep
    trainable: dict
    untrained: dict
    definition: StepDefinition

    def all_parameters(self, trainable: Mapping, others: Mapping = {}) -> dict:
        """Returns all parameters of the generator.

        Args:
          trainable: the trainable parameters.
          others: {part: tree} of parts that are not in `untrained`.
        """
        return merge_parameters(trainable, {**self.untrained, **others})

    def initial_parameters(self, others: Mapping = {}) -> dict:
        """Returns the parameters before the first step, which encode the data.

        Args:
          others: see `all_parameters`.
        """
        return self.all_parameters(self.definition.frozen.get("reference", {}), others)


def assemble(
    config,
    generator,
    parameters,
    empty_token_ids,
    mesh,
    load_others: Callable[[], Mapping[str, Any]] = dict,
):
    """Assembles the step of a generator's objective.

    Args:
      config: the `RunConfig`.
      generator: a Generator.
      parameters: {part: tree} with at least the parts that the step reads, as arrays on the mesh,
        or as `jax.ShapeDtypeStruct`s with shardings. Training donates the trainable arrays.
      empty_token_ids: int [2, L], tokens of the empty caption.
      mesh: device mesh; its devices may be absent if the parameters are shapes.
      load_others: () -> {part: tree} of the parts that `parameters` lacks.

    Returns:
      An Assembly.
    """
    buckets = focus_buckets(config)
    source, encode = make_encoder(generator, config, buckets)
    step = GeneratorStep(generator, config, empty_token_ids, source)
    trainable, untrained = split_parameters(parameters, config.trainable)
    del parameters
    frozen = {"parameters": {part: tree for part, tree in untrained.items() if part in step.parts}}
    if step.objective.needs_reference:
        frozen["reference"] = reference_parameters(trainable, config.dtype, mesh)
    assembly = Assembly(
        generator=generator,
        source=source,
        encode=encode,
        step=step,
        trainable=trainable,
        untrained=untrained,
        definition=StepDefinition(
            reference_pass=step.reference_pass,
            loss=step.loss,
            buckets=buckets,
            frozen=frozen,
            mesh=mesh,
            reads_policy=step.reads_policy,
        ),
    )
    if step.drops:
        with trace_context(mesh):
            frozen["unconditional"] = _computed(
                step.unconditional, assembly.initial_parameters(load_others()), mesh
            )
    return assembly


def _computed(function, tree, mesh):
    """Returns `function(tree)`, replicated on the mesh; shapes if the tree has shapes."""
    whole = meshes.replicated(mesh)
    if _is_abstract(tree):
        return meshes.placed_shapes(jax.eval_shape(function, tree), whole)
    return jax.jit(function, out_shardings=whole)(tree)


def _is_abstract(tree):
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def reference_parameters(trainable, dtype, mesh=None):
    """Returns a copy of the trainable parameters for the reference model.

    Matrices are cast to `dtype`, in which layers use them; vectors keep their type. Arrays keep
    their sharding, and shapes get their sharding on `mesh`.
    """

    def copied(tree):
        return unflatten(
            {
                path: jnp.array(x, x.dtype if stacking.is_vector(path, x.shape) else dtype)
                for path, x in flatten(tree).items()
            }
        )

    if _is_abstract(trainable):
        assert mesh is not None
        shapes = jax.eval_shape(copied, trainable)
        return meshes.placed_shapes(shapes, rules.tree_shardings(shapes, mesh))
    return copied(trainable)


def focus_buckets(config):
    """Returns {name: (StepStructure, BucketParams)} of the objective, noisiest first."""
    focus, objective = config.focus, objectives.get_generator(config.objective)
    uses_focus = objective.uses_focus
    buckets = make_buckets(
        focus.buckets if uses_focus else 1,
        spaf=focus.spaf and uses_focus,
        dpce=focus.dpce and uses_focus,
        detail_fraction=focus.detail_fraction,
        rho_noisy=focus.rho_noisy,
        rho_clean=focus.rho_clean,
        lambda_s=focus.lambda_s,
        lambda_d=focus.lambda_d,
        lambda_c=focus.lambda_c if uses_focus else 0.0,
        tau=focus.tau,
        gate_width=focus.gate_width,
        background=focus.background,
        matched=focus.matched,
    )
    return {
        f"t{int(bucket.params.t_low):03d}-{int(bucket.params.t_high) - 1:03d}": (
            StepStructure(objective, bucket.structure),
            bucket.params,
        )
        for bucket in buckets
    }


def make_encoder(generator, config, buckets):
    """Returns SPAF's source (or None) and the encoder (`encoding.encoder`) for these buckets."""
    source, weights = None, [structure.weight for structure, _ in buckets.values()]
    if any(weight.spaf for weight in weights):
        source = make_source(generator, config, [params for _, params in buckets.values()])
    return source, encoding.encoder(
        generator,
        config,
        source,
        dpce=any(weight.dpce for weight in weights),
        quality=objectives.get(config.objective).needs_quality,
    )
