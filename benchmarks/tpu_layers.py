"""Compiles single layers of SDXL's UNet for a TPU and prints the compiler's estimates of time.

    pip install -e ".[plan]"
    python benchmarks/tpu_layers.py                        # v5e
    python benchmarks/tpu_layers.py --topology=v6e:2x2 --layers resnet
    python benchmarks/tpu_layers.py --layers convolution   # by taps, and XLA's own
    python benchmarks/tpu_layers.py --topology=v5e:4x4 --fsdp=16 --layers transformer
    LIBTPU_INIT_ARGS=--xla_jf_spmd_threshold_for_windowed_einsum_mib=-1 \
        python benchmarks/tpu_layers.py --topology=v5e:4x4 --fsdp=16 --layers transformer

No TPU is needed. Layers are compiled for one chip, in bfloat16, in two settings: one image of 512
px with the gradients of input and parameters, as in full training; and two images of 1024 px with
the gradient of the input alone, as in training of an adapter. With `--fsdp`, parameters are sharded
over several chips, with as many images on each. A layer compiles in seconds (sharded, in minutes),
the whole UNet in a quarter of an hour, so changes of layers can be tested here. The estimates
exclude fused attention kernels, and transfers between chips. "Copies" are those between layouts in
fast memory, whose estimate is nominal (`profiling.estimates`).
"""

import argparse
import os
from typing import Any

PEAK_NOTE = "of peak: time of matmuls at the chip's full speed / estimate"


def cases(jax, jnp):
    """The layers, {name: (module or function, input shapes, trained)}.

    `trained` is whether parameters have gradients, or None for a function without a backward pass.
    """
    from focusdpo_jax.models import convolution, layers
    from focusdpo_jax.models.transformer import Context, TransformerBlock
    from focusdpo_jax.models.unet_config import UNetConfig

    config = UNetConfig(scan_layers=False)

    def shape(*axes):
        return jax.ShapeDtypeStruct(axes, jnp.bfloat16)

    layers_by_name = {}
    for images, side, trained in ((1, 64, True), (2, 128, False)):
        pixels = side * 8
        for level, width in enumerate(config.block_out_channels):
            size, heads = side >> level, config.num_heads[level]
            if level:
                layers_by_name[f"transformer block {width}, {pixels} px"] = (
                    TransformerBlock(config, heads, False, jnp.bfloat16),
                    (shape(images, size * size, width), Context(shape(images, 77, 2048))),
                    trained,
                )
            layers_by_name[f"resnet {width}, {pixels} px"] = (
                layers.ResnetBlock(width, 32, 1e-5, jnp.bfloat16),
                (shape(images, size, size, width), shape(images, 1280)),
                trained,
            )
            padding = ((1, 1), (1, 1))
            for form, function in (("taps", convolution.by_taps), ("XLA", convolution._convolve)):
                layers_by_name[f"convolution {width}, {pixels} px, {form}"] = (
                    lambda x, kernel, function=function: function(x, kernel, padding),
                    (shape(images, size, size, width), shape(3, 3, width, width)),
                    None,
                )
    return layers_by_name


def measure(module, inputs, trained, mesh):
    """Returns the `Estimate`, matmul FLOPs without kernels, and bytes of temporaries.

    These are per chip, as are the shapes of `inputs`.
    """
    import jax
    import jax.numpy as jnp

    from focusdpo_jax import compiling
    from focusdpo_jax.profiling import estimates, flops, hlo
    from focusdpo_jax.sharding import mesh as meshes
    from focusdpo_jax.sharding import rules
    from focusdpo_jax.sharding.trace_context import trace_context

    batch = meshes.batch_sharding(mesh)
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((mesh.size * len(x), *x.shape[1:]), x.dtype), inputs
    )
    gradients = batch
    if trained is None:
        program, arguments = module, inputs
        shardings = (batch, meshes.replicated(mesh))
    else:
        parameters = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

        def program(parameters, x, cotangent, *rest):
            def apply(parameters, x):
                with trace_context(mesh):
                    return jax.tree.leaves(module.apply({"params": parameters}, x, *rest))[0]

            if trained:
                out, backward = jax.vjp(apply, parameters, x)
            else:
                out, backward = jax.vjp(lambda x: apply(parameters, x), x)
            return out, backward(cotangent)

        arguments = (parameters, inputs[0], inputs[0], *inputs[1:])
        placed = rules.tree_shardings(parameters, mesh)
        shardings = (placed, *jax.tree.map(lambda _: batch, arguments[1:]))
        gradients = (batch, (placed, batch) if trained else (batch,))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tuple(arguments)
    )
    traced = jax.jit(program, in_shardings=shardings, out_shardings=gradients).trace(*arguments)
    options: Any = compiling.network_options("tpu")
    compiled = traced.lower().compile(options)
    estimate = estimates.read(hlo.Program(compiled.as_text() or ""))
    work = flops.count(traced)
    memory = compiled.memory_analysis()
    assert memory is not None
    products = (work.matmul_flops - work.kernels) / mesh.size
    return estimate, products, memory.temp_size_in_bytes


def main() -> None:
    """Prints one line per layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument(
        "--fsdp", type=int, default=1, help="chips that parameters are sharded over"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["transformer", "resnet"],
        choices=["transformer", "resnet", "convolution"],
    )
    arguments = parser.parse_args()
    if arguments.fsdp > 1 and "convolution" in arguments.layers:
        parser.error("--layers=convolution compiles functions without sharded parameters: --fsdp=1")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from focusdpo_jax.profiling import chips
    from focusdpo_jax.sharding import mesh as meshes

    chip = chips.TPUS[arguments.topology.partition(":")[0]]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=arguments.topology
    ).devices[: arguments.fsdp]
    mesh = meshes.make_mesh(
        {"data": 1, "fsdp": arguments.fsdp, "tensor": 1}, arguments.fsdp, devices
    )
    print(f"{'':36s} M cycles  copies, MB  temporaries, MB  {PEAK_NOTE}")
    for name, (module, inputs, trained) in cases(jax, jnp).items():
        if name.split()[0] not in arguments.layers:
            continue
        estimate, products, temporaries = measure(module, inputs, trained, mesh)
        print(
            f"{name:36s} {estimate.cycles / 1e6:8.3f} {estimate.nominal_bytes / 1e6:11.1f} "
            f"{temporaries / 1e6:16.1f}  "
            f"{products / chip.flops * chip.clock / estimate.cycles:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
