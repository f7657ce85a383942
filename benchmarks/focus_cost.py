r"""Cost of FocusDPO compared with Diffusion-DPO, in floating-point operations per step.

    python benchmarks/focus_cost.py                # Toybox and SDXL's debug sizes
    python benchmarks/focus_cost.py --cases sdxl   # SDXL at 1024 px

For `dpo` and for every structure and source of similarity of `focus_dpo`, counts the operations of
the reference pass (reference model and weights) and of the policy's loss with its gradient in the
traced programs (`profiling/flops.py`), and prints their ratio to those of `dpo`. The optimiser is
the same in both and is left out. Programs are traced from shapes, without allocation or
compilation. `--repeats=N` also compiles the programs, runs them on zeros N times, alternately with
those of `dpo`, and prints median times.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_cases import load_config

from focusdpo_jax.checkpoints import model_folder
from focusdpo_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from focusdpo_jax.models.generator import (
    PARTS,
    Generator,
    GeneratorConfig,
)
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.models.vae import VAEConfig
from focusdpo_jax.profiling import flops
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import assembly, models
from focusdpo_jax.training.shapes import raw_batch


def case(name: str, **changes) -> tuple[Any, GeneratorConfig]:
    """Returns the configuration and the sizes of "toybox", "debug" or "sdxl"."""
    if name == "toybox":
        return load_config("toybox_dpo", **changes), model_folder.load_config(
            models.shipped("toybox")
        )
    if name == "debug":
        config = load_config("sdxl_dpo", "debug", **changes)
        return config, GeneratorConfig.from_dict(config.model.sizes or {})
    text = CLIPTextConfig()
    return load_config("sdxl_dpo", **changes), GeneratorConfig(
        unet=UNetConfig(image_context=True),
        vae=VAEConfig(),
        text_encoder=text,
        text_encoder_2=CLIPTextConfig(
            hidden_size=1280,
            num_layers=32,
            num_heads=20,
            intermediate_size=5120,
            activation="gelu",
            projection_dim=1280,
        ),
        image_encoder=CLIPVisionConfig(),
        adapter=SubjectAdapterConfig(),
    )


def shapes_of(generator: Any, config: Any) -> dict[str, Any]:
    """Shapes of all parameters {part: tree}, with the dtypes in which a run stores them."""

    def typed(part):
        tree = jax.eval_shape(lambda: generator.init_part(part, jax.random.key(0)))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(
                leaf.shape,
                models.stored_type(config, (part, *(key.key for key in path)), leaf.shape),
            ),
            tree,
        )

    return {part: typed(part) for part in PARTS}


class Programs:
    """The two programs of a configuration's step, traced from shapes."""

    def __init__(self, config: Any, sizes: Any) -> None:
        generator = Generator(sizes, jnp.dtype(config.dtype))
        parameters = shapes_of(generator, config)
        mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size, jax.devices()[:1])
        empty = np.zeros((2, sizes.text_encoder.max_length), np.int32)
        parts = assembly.assemble(config, generator, parameters, empty, mesh)
        self.step, self.trainable = parts.step, parts.trainable
        self.buckets, self.frozen = parts.definition.buckets, parts.definition.frozen
        self.pairs = jax.eval_shape(parts.encode, parameters, raw_batch(config, generator))

    def reference_passes(self):
        """{structure: (traced reference pass, its arguments)}."""
        key, passes = jax.random.key(0), {}
        for structure, params in self.buckets.values():
            arguments = (self.frozen, self.pairs, params, key)
            program = jax.jit(self.step.reference_pass, static_argnums=0)
            passes.setdefault(structure, (program.trace(structure, *arguments), arguments))
        return passes

    def update(self) -> tuple[Any, tuple[Any, ...]]:
        """Returns the traced loss with its gradient, and its arguments."""
        (structure, params), key = next(iter(self.buckets.values())), jax.random.key(0)
        outputs, _ = jax.eval_shape(
            lambda *arguments: self.step.reference_pass(structure, *arguments),
            self.frozen,
            self.pairs,
            params,
            key,
        )
        arguments = (self.trainable, self.frozen, self.pairs, outputs, params, key)
        gradient = jax.jit(jax.value_and_grad(self.step.loss, has_aux=True))
        return gradient.trace(*arguments), arguments


def seconds(programs: Any, repeats: int) -> np.ndarray:
    """Median seconds of programs [(compiled, arguments)], which run alternately on zeros."""
    programs = [
        (
            compiled,
            jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
                arguments,
            ),
        )
        for compiled, arguments in programs
    ]
    times = []
    for _ in range(repeats + 1):
        times.append([])
        for compiled, arguments in programs:
            start = time.monotonic()
            jax.block_until_ready(compiled(*arguments))
            times[-1].append(time.monotonic() - start)
    return np.median(times[1:], axis=0)  # The first round is a warm-up.


def measure(name: str, repeats: int) -> None:
    """Prints one line for `dpo` and one per source and structure of `focus_dpo`."""

    def compile_and_count(traced, arguments):
        compiled = traced.lower().compile() if repeats else None
        return flops.count(traced).total, (compiled, arguments)

    base = update = None
    for features in ("", "vit", "unet", "attention"):
        config, sizes = case(
            name,
            objective="focus_dpo" if features else "dpo",
            focus__features=features or "vit",
        )
        programs = Programs(config, sizes)
        if update is None:  # The update is the same for all structures.
            update = compile_and_count(*programs.update())
        for structure, program in programs.reference_passes().items():
            reference_pass = compile_and_count(*program)
            base = base or reference_pass
            total, plain = reference_pass[0] + update[0], base[0] + update[0]
            line = (
                f"{name:8s} {structure!s:24s} {features:10s} {total:.4e} operations, "
                f"{total / plain:.4f} of dpo's"
            )
            if repeats:
                this, of_dpo, of_update = seconds([reference_pass[1], base[1], update[1]], repeats)
                line += (
                    f"; {this + of_update:.3f} s, {(this + of_update) / (of_dpo + of_update):.3f}"
                )
            print(line, flush=True)


def main() -> None:
    """Measures each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=["toybox", "debug"], choices=["toybox", "debug", "sdxl"]
    )
    parser.add_argument("--repeats", type=int, default=0, help="timed runs; 0 only counts")
    arguments = parser.parse_args()
    for name in arguments.cases:
        measure(name, arguments.repeats)


if __name__ == "__main__":
    main()
