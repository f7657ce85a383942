r"""SDXL's UNet compiled for a TPU that is not there, here and by MaxDiffusion: the compiler's estimates.

    pip install -e ".[plan]" chex qwix tokamax aqtp google-cloud-storage tensorboardX
    python benchmarks/tpu_unet.py --maxdiffusion=FOLDER            # a checkout of its repository
    python benchmarks/tpu_unet.py --sides 1024 --programs forward  # ours alone

One image a chip on v5e:2x2, bfloat16 parameters, all of them differentiated, nothing computed again in the
backward pass. Each program is compiled in a process of its own, ours and theirs one after the other. The
peer attends as its configuration for SDXL says, "flash" (over more than `flash_min_seq_length` positions)
or, as its default is, "dot_product".

The first column is the compiler's estimate of time, `profiling.estimates`: cycles of all instructions. Fused
attention kernels (ours, and theirs with "flash") carry no estimate; the second column adds their products
at the chip's full speed, and is a lower bound where there are any. The others are counts.
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
SIDES = ("ours", "dot_product", "flash")


def compiled(network, program, side: int, topology: str):
    """Compiles and describes one program; what `main` prints a line of."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    import jax
    import jax.numpy as jnp
    import looped_cost
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from focusdpo_jax.planning import chips
    from focusdpo_jax.profiling import estimates, hlo
    from focusdpo_jax.profiling import flops as traced_operations

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh([[[device]] for device in devices], ("data", "fsdp", "tensor"))
    count, size = len(devices), side // 8

    def shape(*axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((count, *axes), dtype)

    inputs = {"text": shape(77, 2048), "pooled": shape(1280), "time_ids": shape(6)}
    latents, timesteps = shape(size, size, 4), shape(dtype=jnp.float32)
    example = latents, timesteps, inputs
    parameters, apply = ours(mesh, example) if network == "ours" else peers(network, mesh, example)

    def placed(tree, spec):
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

    parameters = placed(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), parameters),
        PartitionSpec(),
    )
    arguments = placed((latents, timesteps, inputs), PartitionSpec("data"))
    start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with mesh:
        traced = jax.jit({"forward": forward, "gradient": gradient}[program]).trace(
            parameters, *arguments
        )
        compiled_program: Any = traced.lower().compile()
    seconds, use = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    operations, accessed = looped_cost.count(compiled_program)
    estimate = estimates.read(hlo.Program(compiled_program.as_text() or ""))
    kernels = traced_operations.count(traced).kernels / count
    chip = chips.TPUS[topology.partition(":")[0]]
    return {
        "cycles": estimate.cycles,
        "kernels": kernels,
        "estimated": estimates.seconds(estimate, chip, kernels),
        "most_expensive": estimate.sources[:10],
        "peak": chip.flops,
        "operations": operations,
        "bytes": accessed,
        "temporaries": compiled_program.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
        "processor": use.ru_utime - used,
        "host": use.ru_maxrss * 1024,
    }


def ours(mesh, example):
    """Shapes of our parameters, and the prediction as a function of them."""
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


def peers(network, mesh, example):
    """The same of MaxDiffusion's `FlaxUNet2DConditionModel`, with an attention of its own."""
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
    """Compiles each program in a process of its own and prints a line of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxdiffusion", help="folder of its checkout, with src/ in it")
    parser.add_argument("--sides", nargs="+", type=int, default=[512])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--networks", nargs="+", choices=SIDES)
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
        print(json.dumps(compiled(network, program, int(side), arguments.topology)))
        return
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if arguments.maxdiffusion:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(pathlib.Path(arguments.maxdiffusion) / "src"), environment.get("PYTHONPATH", "")]
        )
    networks = arguments.networks or SIDES[: 3 if arguments.maxdiffusion else 1]
    print(
        f"{'':30s} M cycles  ms with kernels  of peak  TFLOP  GB accessed  temporaries GB  "
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
                found = json.loads(run.stdout.splitlines()[-1])
                done = found["operations"] + found["kernels"]
                print(
                    f"{side:5d} {program:9s} {network:14s} {found['cycles'] / 1e6:8.1f} "
                    f"{1e3 * found['estimated']:16.1f} "
                    f"{done / found['peak'] / found['estimated']:8.0%} {done / 1e12:6.3f} "
                    f"{found['bytes'] / 1e9:12.2f} {found['temporaries'] / 1e9:15.3f} "
                    f"{found['seconds']:8.0f} {found['processor']:12.0f} "
                    f"{found['host'] / 1e9:8.1f}",
                    flush=True,
                )
                if arguments.most_expensive:
                    for name, cycles, times in found["most_expensive"]:
                        print(f"      {cycles / 1e6:8.2f} M cycles in {times:4d}: {name}")


if __name__ == "__main__":
    main()
