r"""The arithmetic that a preference step with an adapter in training cannot do without.

    python benchmarks/minimum.py                                   # Toybox and SDXL's debug sizes
    python benchmarks/minimum.py --cases sdxl-1024 --topology=v5e:2x2

Counted layer by layer from the networks' sizes, without a look at our program: `dpo`'s step, its
matrix products and convolutions, a multiplication with an addition as two operations. For each of a
pair's two pictures the UNet runs forward once for the reference model and once for the policy. The
policy's backward pass goes back to the first trained layer, and makes no gradient of what is
frozen, nor of features before any trained layer. The subject adapter runs once a pair and model.
With remat every resnet and transformer block of the policy that has something to differentiate runs
forward a second time, but for the last product of each, which no gradient needs.

What depends on the condition alone is made once: keys and values of the caption a pair, those of
the references a pair and model, embeddings of time a pair.

Our program's operations are those of `profiling/flops.py`, traced from shapes alone.
`--topology` is the machine that it is traced for, since attention and feed-forwards are written
differently for a CPU.
"""

import argparse
import dataclasses
from typing import Any

from benchmark_cases import load_config

from focusdpo_jax.planning import chips
from focusdpo_jax.profiling import flops
from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import models, shapes
from focusdpo_jax.training.step import trace_step

CASES = {
    "toybox": ("toybox_dpo", "", 64),
    "debug": ("sdxl_dpo", "debug", 64),
    "sdxl-512": ("sdxl_dpo", "", 512),
    "sdxl-1024": ("sdxl_dpo", "", 1024),
}


@dataclasses.dataclass
class Cost:
    """Operations by when they are done.

    Attributes:
      forward: in a forward pass over a picture.
      backward: in the policy's backward pass over a picture.
      again: in a picture's second forward pass, of the remat.
      time: embeddings of time, in a forward pass.
      text: keys and values of the caption, in a forward pass.
      image: keys and values of the references, in a forward pass.
      adapter, adapter_backward: of the subject adapter, in its pass over a pair.
    """

    forward: float = 0
    backward: float = 0
    again: float = 0
    time: float = 0
    text: float = 0
    image: float = 0
    adapter: float = 0
    adapter_backward: float = 0

    def layer(self, cost, reached, *, remat: bool = True) -> None:
        """A frozen layer; `reached` is the share of its input that depends on what is trained."""
        self.forward += cost
        self.backward += cost * reached
        self.again += cost * remat

    def step(self, remat: bool):
        """Of a pair's whole step."""
        return (
            2 * (2 * self.forward + self.backward + remat * self.again)
            + 2 * self.adapter
            + self.adapter_backward
            # In the policy each key and value of the references has two gradients.
            + self.time
            + self.text
            + 4 * self.image
        )


@dataclasses.dataclass
class Features:
    """A feature map on its way: width, and whether anything trained lies before it."""

    channels: int
    reached: bool = False


def unet(cost, config: Any, side: int, text_tokens: int, image_tokens: int) -> None:
    """Adds the UNet's, for latents of `side` x `side`."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    embedding = 4 * widths[0]

    def resnet(inputs, width, pixels):
        """Of concatenated inputs."""
        channels = sum(x.channels for x in inputs)
        reached = sum(x.channels for x in inputs if x.reached) / channels
        cost.time += 2 * embedding * width
        cost.layer(2 * pixels * 9 * channels * width, reached, remat=reached > 0)
        cost.layer(2 * pixels * 9 * width * width, reached > 0, remat=False)
        if channels != width:
            cost.layer(2 * pixels * channels * width, reached, remat=False)
        return Features(width, reached > 0)

    def transformer(x, depth, pixels):
        width = x.channels
        dense = 2 * pixels * width * width
        cost.layer(dense, x.reached, remat=False)
        for _ in range(depth):
            cost.layer(4 * dense + 2 * (2 * pixels**2 * width), x.reached)
            cost.backward += 2 * (2 * pixels**2 * width) * x.reached  # Two gradients a product.
            cost.layer(2 * dense, x.reached)
            # What leaves cross-attention depends on what is trained.
            cost.backward += dense * (not x.reached)
            cost.text += 2 * (2 * text_tokens * config.cross_attention_dim * width)
            cost.layer(2 * (2 * pixels * text_tokens * width), x.reached)
            cost.image += 2 * (2 * image_tokens * config.cross_attention_dim * width)
            seen = 2 * (2 * pixels * image_tokens * width)
            cost.layer(seen, 2 if x.reached else 1.5)
            cost.layer(8 * dense, True)
            cost.layer(4 * dense, True, remat=False)
            x = Features(width, True)
        cost.layer(dense, x.reached, remat=False)
        return x

    def stage(x, level, depth, resnets, attentions, pixels, skips=()):
        made = []
        for i in range(resnets):
            x = resnet([x, skips[i]] if skips else [x], widths[level], pixels)
            if depth and i < attentions:
                x = transformer(x, depth, pixels)
            made.append(x)
        return x, made

    cost.time += 2 * (widths[0] * embedding + embedding**2)
    cost.time += 2 * (
        (config.pooled_dim + 6 * config.addition_time_embed_dim) * embedding + embedding**2
    )
    pixels = [(side // 2**level) ** 2 for level in range(last + 1)]
    cost.layer(2 * pixels[0] * 9 * config.in_channels * widths[0], 0, remat=False)
    x = Features(widths[0])
    skips = [x]
    for level, depth in enumerate(config.transformer_layers_per_block):
        count = config.layers_per_block
        x, made = stage(x, level, depth, count, count, pixels[level])
        skips += made
        if level < last:
            cost.layer(2 * pixels[level + 1] * 9 * x.channels**2, x.reached, remat=False)
            skips.append(x)
    x, _ = stage(x, last, config.mid_transformer_layers, 2, 1, pixels[last])
    for level in reversed(range(last + 1)):
        count = config.layers_per_block + 1
        x, _ = stage(
            x,
            level,
            config.transformer_layers_per_block[level],
            count,
            count,
            pixels[level],
            [skips.pop() for _ in range(count)],
        )
        if level:
            cost.layer(2 * pixels[level - 1] * 9 * x.channels**2, x.reached, remat=False)
    cost.layer(2 * pixels[0] * 9 * widths[0] * config.out_channels, x.reached, remat=False)


def resampler(cost, config: Any, slots: int, patches) -> None:
    """Adds the subject adapter's, all of which is trained."""
    width, inner, queries = config.width, config.num_heads * config.head_dim, config.num_tokens
    first = 2 * patches * config.input_dim * width
    keys = patches + queries
    attention = 2 * (2 * queries * keys * inner)
    layer = (
        2 * (2 * queries * width * inner)
        + 2 * (2 * keys * width * inner)
        + attention
        + 2 * (2 * queries * width * config.expansion * width)
    )
    rest = config.depth * layer + 2 * queries * width * config.output_dim
    cost.adapter += slots * (first + rest)
    cost.adapter_backward += slots * (first + 2 * rest)  # The features are given.


def counted(generator: Any, batch):
    """The minimum of a pair, as a Cost; `batch` is EncodedPairs of shapes."""
    if generator.config.adapter.kind != "resampler":
        raise SystemExit("only a resampler is counted here")
    slots, patches = batch.references.features.shape[1:3]
    cost = Cost()
    unet(
        cost,
        generator.config.unet,
        batch.prior.shape[1],
        batch.text.shape[1],
        slots * generator.config.adapter.num_tokens,
    )
    resampler(cost, generator.config.adapter, slots, patches)
    return cost


def case(name: str, remat: bool):
    """The configuration of a case, of `dpo` with an adapter."""
    file, argument, side = CASES[name]
    return load_config(
        file,
        *([argument] if argument else []),
        objective="dpo",
        trainable="adapter",
        resolution=side,
        batch_size=1,
        accumulate=1,
        model__remat=remat,
    )


def ours(config: Any, topology: str):
    """Operations of our reference pass and our update for a pair, and the minimum as a Cost."""
    mesh = meshes.make_mesh(config.mesh.sizes, 1, chips.devices(topology)[0][:1])
    step = shapes.abstract_step(config, mesh)
    passes, update = trace_step(
        step.assembly.definition, step.optimizer, step.state, step.batch, step.key
    )
    done = sum(flops.count(trace()).matmul_flops for trace in (*passes.values(), update))
    return done, counted(models.abstract_model(config, mesh)[0], step.batch)


def main() -> None:
    """Prints a line for each case, with and without remat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["toybox", "debug"], choices=list(CASES))
    parser.add_argument("--topology", default="local", help="local, or a TPU's such as v5e:2x2")
    arguments = parser.parse_args()
    for name in arguments.cases:
        for remat in (False, True):
            done, cost = ours(case(name, remat), arguments.topology)
            least = cost.step(remat)
            print(
                f"{name:10s} remat {'on ' if remat else 'off'}  ours {done:.4e}  "
                f"minimum {least:.4e}, ratio {done / least:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
