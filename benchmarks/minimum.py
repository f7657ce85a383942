r"""Minimum FLOPs of a preference step that trains an adapter, compared with ours.

    python benchmarks/minimum.py                                   # Toybox and SDXL's debug sizes
    python benchmarks/minimum.py --cases sdxl-1024 --topology=v5e:2x2

The minimum is counted layer by layer from the networks' sizes, independently of our program: matrix
products and convolutions of `dpo`'s step, with a multiplication and an addition as two operations.

- For both images of a pair, the UNet runs forward once in the reference model and once in the
  policy.
- The policy's backward pass ends at the first trained layer. It computes no gradients of frozen
  parameters or of features that do not depend on trained parameters.
- The subject adapter runs once per pair and model.
- Computations that depend on the conditioning alone run once: keys and values of the caption and
  embeddings of time per pair, keys and values of the references per pair and model.
- With remat, every resnet and transformer block of the policy with a backward pass runs forward a
  second time, except for its last product, which no gradient needs.

Our operations are counted by `profiling/flops.py` in the traced program. `--topology` is the
machine that the program is traced for, since attention and feed-forwards differ on a CPU.
"""

import argparse
import dataclasses
from typing import Any

from benchmark_cases import load_config

from focusdpo_jax.planning import targets
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
    """Operations by part of the step.

    Attributes:
      forward: forward pass of an image.
      backward: the policy's backward pass of an image.
      recomputed: second forward pass of an image with remat.
      time: embeddings of time, in a forward pass.
      text: keys and values of the caption, in a forward pass.
      image: keys and values of the references, in a forward pass.
      adapter, adapter_backward: passes of the subject adapter over a pair.
    """

    forward: float = 0
    backward: float = 0
    recomputed: float = 0
    time: float = 0
    text: float = 0
    image: float = 0
    adapter: float = 0
    adapter_backward: float = 0

    def layer(self, cost, gradient_share, *, remat: bool = True) -> None:
        """Adds a frozen layer.

        Args:
          cost: operations of a forward pass.
          gradient_share: operations of the backward pass as a fraction of `cost`. For most layers
            this is the share of the input channels that depend on trained parameters.
          remat: whether remat recomputes the layer.
        """
        self.forward += cost
        self.backward += cost * gradient_share
        self.recomputed += cost * remat

    def step(self, remat: bool):
        """Operations of a whole step per pair."""
        return (
            2 * (2 * self.forward + self.backward + remat * self.recomputed)
            + 2 * self.adapter
            + self.adapter_backward
            # Forward in both models, and two gradients in the policy.
            + self.time
            + self.text
            + 4 * self.image
        )


@dataclasses.dataclass
class Features:
    """A feature map: its width, and whether it depends on trained parameters."""

    channels: int
    needs_gradient: bool = False


def unet(cost, config: Any, side: int, text_tokens: int, image_tokens: int) -> None:
    """Adds the UNet to `cost`, for latents of `side` x `side`."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    embedding = 4 * widths[0]

    def resnet(inputs, width, pixels):
        """Adds a resnet block on concatenated inputs."""
        channels = sum(x.channels for x in inputs)
        gradient_share = sum(x.channels for x in inputs if x.needs_gradient) / channels
        cost.time += 2 * embedding * width
        cost.layer(2 * pixels * 9 * channels * width, gradient_share, remat=gradient_share > 0)
        cost.layer(2 * pixels * 9 * width * width, gradient_share > 0, remat=False)
        if channels != width:
            cost.layer(2 * pixels * channels * width, gradient_share, remat=False)
        return Features(width, gradient_share > 0)

    def transformer(x, depth, pixels):
        width = x.channels
        dense = 2 * pixels * width * width
        cost.layer(dense, x.needs_gradient, remat=False)
        for _ in range(depth):
            cost.layer(4 * dense + 2 * (2 * pixels**2 * width), x.needs_gradient)
            # Each product of attention has two gradients, of which `layer` counts one.
            cost.backward += 2 * (2 * pixels**2 * width) * x.needs_gradient
            cost.layer(2 * dense, x.needs_gradient)
            # The output of cross-attention always depends on trained parameters.
            cost.backward += dense * (not x.needs_gradient)
            cost.text += 2 * (2 * text_tokens * config.cross_attention_dim * width)
            cost.layer(2 * (2 * pixels * text_tokens * width), x.needs_gradient)
            cost.image += 2 * (2 * image_tokens * config.cross_attention_dim * width)
            image_attention = 2 * (2 * pixels * image_tokens * width)
            cost.layer(image_attention, 2 if x.needs_gradient else 1.5)
            cost.layer(8 * dense, True)
            cost.layer(4 * dense, True, remat=False)
            x = Features(width, True)
        cost.layer(dense, x.needs_gradient, remat=False)
        return x

    def stage(x, level, depth, resnets, attentions, pixels, skips=()):
        outputs = []
        for i in range(resnets):
            x = resnet([x, skips[i]] if skips else [x], widths[level], pixels)
            if depth and i < attentions:
                x = transformer(x, depth, pixels)
            outputs.append(x)
        return x, outputs

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
        x, outputs = stage(x, level, depth, count, count, pixels[level])
        skips += outputs
        if level < last:
            cost.layer(2 * pixels[level + 1] * 9 * x.channels**2, x.needs_gradient, remat=False)
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
            cost.layer(2 * pixels[level - 1] * 9 * x.channels**2, x.needs_gradient, remat=False)
    cost.layer(2 * pixels[0] * 9 * widths[0] * config.out_channels, x.needs_gradient, remat=False)


def resampler(cost, config: Any, slots: int, patches) -> None:
    """Adds the subject adapter to `cost`; all of its parameters are trained."""
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
    cost.adapter_backward += slots * (first + 2 * rest)  # No gradient of the input features.


def minimum(generator: Any, batch):
    """The minimum per pair as a Cost; `batch` is EncodedPairs of shapes."""
    if generator.config.adapter.kind != "resampler":
        raise SystemExit("only the adapter kind resampler is supported")
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
    """The configuration of a case: `dpo` that trains an adapter."""
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
    """Operations of our reference pass and update per pair, and the minimum as a Cost."""
    mesh = meshes.make_mesh(config.mesh.sizes, 1, targets.devices(topology)[0][:1])
    step = shapes.abstract_step(config, mesh)
    passes, update = trace_step(
        step.assembly.definition, step.optimizer, step.state, step.batch, step.key
    )
    actual = sum(flops.count(trace()).matmul_flops for trace in (*passes.values(), update))
    return actual, minimum(models.abstract_model(config, mesh)[0], step.batch)


def main() -> None:
    """Prints one line per case without and with remat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["toybox", "debug"], choices=list(CASES))
    parser.add_argument(
        "--topology", default="local", help="local, or that of a TPU such as v5e:2x2"
    )
    arguments = parser.parse_args()
    for name in arguments.cases:
        for remat in (False, True):
            actual, cost = ours(case(name, remat), arguments.topology)
            least = cost.step(remat)
            print(
                f"{name:10s} remat {'on ' if remat else 'off'}  ours {actual:.4e}  "
                f"minimum {least:.4e}, ratio {actual / least:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
