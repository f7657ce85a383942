"""Layers of SDXL's UNet compiled for a TPU that is not there: the compiler's estimate of each by itself.

    pip install -e ".[plan]"
    python benchmarks/tpu_layers.py                        # v5e
    python benchmarks/tpu_layers.py --topology=v6e:2x2 --layers resnet
    python benchmarks/tpu_layers.py --layers convolution   # by taps, and as XLA has it

One chip, bfloat16. At 512 px one image and the gradients of its input and of all parameters, as in full
training; at 1024 px two images and the gradient of the input alone, as where an adapter is trained. A layer by
itself is compiled in seconds, where the whole UNet takes a quarter of an hour: it is where to try a
change. Fused attention kernels have no estimate and are missing.
"""

import argparse
import os

PEAK_NOTE = "of peak: products at the chip's full speed / estimate"


def cases(jax, jnp):
    """{name: (module or function of (x, parameters), input shapes, whether parameters are trained)}."""
    from focusdpo_jax.models import convolution, layers
    from focusdpo_jax.models.transformer import Context, TransformerBlock
    from focusdpo_jax.models.unet_config import UNetConfig

    config = UNetConfig(scan_layers=False)

    def shape(*axes):
        return jax.ShapeDtypeStruct(axes, jnp.bfloat16)

    found = {}
    for images, side, trained in ((1, 64, True), (2, 128, False)):
        pixels = side * 8
        for level, width in enumerate(config.block_out_channels):
            size, heads = side >> level, config.num_heads[level]
            if level:
                found[f"transformer block {width}, {pixels} px"] = (
                    TransformerBlock(config, heads, False, jnp.bfloat16),
                    (shape(images, size * size, width), Context(shape(images, 77, 2048))),
                    trained,
                )
            found[f"resnet {width}, {pixels} px"] = (
                layers.ResnetBlock(width, 32, 1e-5, jnp.bfloat16),
                (shape(images, size, size, width), shape(images, 1280)),
                trained,
            )
            padding = ((1, 1), (1, 1))
            for form, function in (("taps", convolution.by_taps), ("XLA", convolution._convolve)):
                found[f"convolution {width}, {pixels} px, {form}"] = (
                    lambda x, kernel, function=function: function(x, kernel, padding),
                    (shape(images, size, size, width), shape(3, 3, width, width)),
                    None,
                )
    return found


def measure(module, inputs, trained, mesh):
    """(estimated cycles, floating-point operations of products) of a layer on one chip."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from focusdpo_jax.profiling import estimates, flops, hlo
    from focusdpo_jax.sharding.trace_context import trace_context

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
            ),
            tree,
        )

    if trained is None:
        program, arguments = module, inputs
    else:
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        parameters = jax.eval_shape(lambda: module.init(jax.random.key(0), *example))["params"]

        def program(parameters, x, outer, *rest):
            def apply(parameters, x):
                with trace_context(mesh):
                    return jax.tree.leaves(module.apply({"params": parameters}, x, *rest))[0]

            if trained:
                out, back = jax.vjp(apply, parameters, x)
            else:
                out, back = jax.vjp(lambda x: apply(parameters, x), x)
            return out, back(outer)

        arguments = (parameters, inputs[0], inputs[0], *inputs[1:])
    traced = jax.jit(program).trace(*placed(arguments))
    estimate = estimates.read(hlo.Program(traced.lower().compile().as_text() or ""))
    work = flops.count(traced)
    return estimate.cycles, work.matmul_flops - work.kernels


def main() -> None:
    """Prints a line of each layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["transformer", "resnet"],
        choices=["transformer", "resnet", "convolution"],
    )
    arguments = parser.parse_args()
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from focusdpo_jax.planning import chips

    chip = chips.TPUS[arguments.topology.partition(":")[0]]
    device = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices[
        0
    ]
    mesh = Mesh([[[device]]], ("data", "fsdp", "tensor"))
    print(f"{'':36s} M cycles  {PEAK_NOTE}")
    for name, (module, inputs, trained) in cases(jax, jnp).items():
        if name.split()[0] not in arguments.layers:
            continue
        cycles, products = measure(module, inputs, trained, mesh)
        print(
            f"{name:36s} {cycles / 1e6:8.3f}  {products / chip.flops * chip.clock / cycles:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
