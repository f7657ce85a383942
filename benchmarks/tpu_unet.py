r"""Compiles SDXL's UNet and MaxDiffusion's for a TPU and prints the compiler's estimates.

    pip install -e ".[plan]" chex qwix tokamax aqtp google-cloud-storage tensorboardX
    python benchmarks/tpu_unet.py --maxdiffusion=FOLDER            # a checkout of MaxDiffusion
    python benchmarks/tpu_unet.py --sides 1024 --programs forward  # ours alone

No TPU is needed. Programs are compiled for v5e:2x2 with one image per chip and bfloat16 parameters,
all of them differentiated, without recomputation in the backward pass. Each program is compiled in
a separate process. MaxDiffusion's attention is "flash", as in its configuration for SDXL (above
`flash_min_seq_length` positions), or "dot_product", its default.

The first column is the compiler's estimate of time, the cycles of all instructions
(`profiling.estimates`). Fused attention kernels (ours, and theirs with "flash") have no estimate.
"ms with kernels" adds their matmuls at the chip's full speed, and is a lower bound for programs
with such kernels. "Copies" are those between layouts in fast memory, in GB, whose estimate is
nominal (`profiling.estimates`). The other columns are counts.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

PROGRAMS = ("forward", "gradient")
NETWORKS = ("ours", "dot_product", "flash")


def compile_program(network, program, side: int, topology: str):
    """Compiles one program and returns the values that `main` prints."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    import jax
    import jax.numpy as jnp
    import looped_cost
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from focusdpo_jax.profiling import chips, estimates, hlo
    from focusdpo_jax.profiling import flops as traced_operations

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh([[[device]] for device in devices], ("data", "fsdp", "tensor"))
    count, size = len(devices), side // 8

    def shape(*axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((count, *axes), dtype)

    inputs = {"text": shape(77, 2048), "pooled": shape(1280), "time_ids": shape(6)}
    latents, timesteps = shape(size, size, 4), shape(dtype=jnp.float32)
    example = latents, timesteps, inputs
    parameters, apply = (
        ours(mesh, example) if network == "ours" else maxdiffusion_unet(network, mesh, example)
    )

    def with_sharding(tree, spec):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            tree,
        )

    def forward(parameters, *arguments):
        return apply(parameters, *arguments)

    def gradient(parameters, *arguments):
        return jax.grad(
            lambda tree: jnp.square(apply(tree, *arguments).astype(jnp.float32)).mean()
        )(parameters)

    parameters = with_sharding(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), parameters),
        PartitionSpec(),
    )
    arguments = with_sharding((latents, timesteps, inputs), PartitionSpec("data"))
    start, user_start = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with mesh:
        traced = jax.jit({"forward": forward, "gradient": gradient}[program]).trace(
            parameters, *arguments
        )
        compiled: Any = traced.lower().compile()
    seconds, usage = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    operations, accessed = looped_cost.count(compiled)
    estimate = estimates.read(hlo.Program(compiled.as_text() or ""))
    kernels = traced_operations.count(traced).kernels / count
    chip = chips.TPUS[topology.partition(":")[0]]
    return {
        "cycles": estimate.cycles,
        "kernels": kernels,
        "estimated": estimates.seconds(estimate, chip, kernels),
        "most_expensive": estimate.sources[:10],
        "peak": chip.flops,
        "nominal": estimate.nominal_bytes,
        "operations": operations,
        "bytes": accessed,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
        "processor": usage.ru_utime - user_start,
        "host": usage.ru_maxrss * 1024,
    }


def ours(mesh, example):
    """Returns the shapes of our parameters and the prediction as a function of parameters."""
    import jax
    import jax.numpy as jnp

    from focusdpo_jax.models.unet import UNet, UNetConfig
    from focusdpo_jax.sharding.trace_context import trace_context

    unet = UNet(UNetConfig(scan_layers=False), jnp.bfloat16)

    def apply(parameters, latents, timesteps, inputs):
        with trace_context(mesh):
            return unet.apply(
                {"params": parameters},
                latents,
                timesteps,
                inputs["text"],
                inputs["pooled"],
                inputs["time_ids"],
            )[0]

    latents, timesteps, inputs = example
    return jax.eval_shape(
        lambda: unet.init(
            jax.random.key(0),
            *(
                jnp.zeros(x.shape, x.dtype)
                for x in (latents, timesteps, inputs["text"], inputs["pooled"], inputs["time_ids"])
            ),
        )
    )["params"], apply


def maxdiffusion_unet(network, mesh, example):
    """Like `ours`, for MaxDiffusion's `FlaxUNet2DConditionModel` with its attention `network`."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from maxdiffusion.models.unet_2d_condition_flax import (  # pyright: ignore[reportMissingImports]
        FlaxUNet2DConditionModel,
    )

    unet = FlaxUNet2DConditionModel(
        sample_size=example[0].shape[1],
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        split_head_dim=True,
        attention_kernel=network,
        flash_min_seq_length=512,
        mesh=mesh,
        dtype=jnp.bfloat16,
        weights_dtype=jnp.bfloat16,
    )
    rules = (("activation_batch", "data"), ("activation_heads", None), ("activation_length", None))

    def apply(parameters, latents, timesteps, inputs):
        with nn.logical_axis_rules(rules):
            return unet.apply(
                {"params": parameters},
                latents.transpose(0, 3, 1, 2),
                timesteps,
                inputs["text"],
                {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
            ).sample

    shapes = unet.init_weights(jax.random.key(0), eval_only=True)
    return nn.unbox(shapes), apply


def main() -> None:
    """Compiles each program in a separate process and prints one line per program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxdiffusion", help="folder of a checkout, which contains src/")
    parser.add_argument("--sides", nargs="+", type=int, default=[512])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument(
        "--most-expensive",
        action="store_true",
        help="list the ten most expensive kinds of operations of each program",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        network, program, side = arguments.one.split("/")
        print(json.dumps(compile_program(network, program, int(side), arguments.topology)))
        return
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if arguments.maxdiffusion:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(pathlib.Path(arguments.maxdiffusion) / "src"), environment.get("PYTHONPATH", "")]
        )
    networks = arguments.networks or NETWORKS[: 3 if arguments.maxdiffusion else 1]
    print(
        f"{'':30s} M cycles  copies  ms with kernels  of peak  TFLOP  GB accessed  temporaries GB  "
        "seconds  (processor)  host GB"
    )
    for side in arguments.sides:
        for program in arguments.programs:
            for network in networks:
                run = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        f"--one={network}/{program}/{side}",
                        f"--topology={arguments.topology}",
                    ],
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                if run.returncode:
                    raise SystemExit(f"{network}, {program}:\n{run.stderr[-3000:]}")
                result = json.loads(run.stdout.splitlines()[-1])
                total = result["operations"] + result["kernels"]
                print(
                    f"{side:5d} {program:9s} {network:14s} {result['cycles'] / 1e6:8.1f} "
                    f"{result['nominal'] / 1e9:7.2f} {1e3 * result['estimated']:16.1f} "
                    f"{total / result['peak'] / result['estimated']:8.0%} {total / 1e12:6.3f} "
                    f"{result['bytes'] / 1e9:12.2f} {result['temporaries'] / 1e9:15.3f} "
                    f"{result['seconds']:8.0f} {result['processor']:12.0f} "
                    f"{result['host'] / 1e9:8.1f}",
                    flush=True,
                )
                if arguments.most_expensive:
                    for name, cycles, times in result["most_expensive"]:
                        print(f"      {cycles / 1e6:8.2f} M cycles in {times:4d}: {name}")


if __name__ == "__main__":
    main()
