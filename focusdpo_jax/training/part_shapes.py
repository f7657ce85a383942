"""Computes the shapes of a generator's parameters without allocating arrays.

Tracing SDXL's initialisation takes seconds, mostly for repeated blocks. Only one block of every
stack is traced here, and its shapes are repeated for the others.
"""

import dataclasses
import functools
import re

import jax

from focusdpo_jax.models import stacking
from focusdpo_jax.models.generator import Generator
from focusdpo_jax.models.parameters import flatten

_TOWERS = ("text_encoder", "text_encoder_2", "image_encoder")
_FIRST = re.compile(rf"(layers|{stacking.STACKED})_0$")


def part_shapes(sizes, part):
    """Returns the shapes of the parameters of one part, equal to those of `Generator.init_part`.

    Args:
      sizes: the `GeneratorConfig`.
      part: one of `generator.PARTS`.

    Returns:
      {path: jax.ShapeDtypeStruct}.
    """
    shapes = {}
    for path, leaf in _traced(_thin(sizes, part), part).items():
        where = next((i for i, name in enumerate(path) if _FIRST.match(name)), None)
        if where is None or part not in ("unet", *_TOWERS):
            shapes[path] = leaf
            continue
        name = path[where].removesuffix("_0")
        count = _depth(sizes.unet, path[0]) if part == "unet" else getattr(sizes, part).num_layers
        if part == "unet" and sizes.unet.scan_layers:
            shapes[*path[:where], name, *path[where + 1 :]] = jax.ShapeDtypeStruct(
                (count, *leaf.shape), leaf.dtype
            )
            continue
        for i in range(count):
            shapes[*path[:where], f"{name}_{i}", *path[where + 1 :]] = leaf
    return shapes


def _thin(sizes, part):
    """Returns the sizes with one block in each stack.

    Fields that do not affect `part` are set to common values, for the cache of `_traced`.
    """
    unet = dataclasses.replace(
        sizes.unet,
        scan_layers=False,
        remat=False,
        transformer_layers_per_block=tuple(
            min(depth, 1) for depth in sizes.unet.transformer_layers_per_block
        ),
        mid_transformer_layers=min(sizes.unet.mid_transformer_layers, 1),
        lora_rank=sizes.unet.lora_rank if part == "unet" else 0,
    )
    towers = {name: dataclasses.replace(getattr(sizes, name), num_layers=1) for name in _TOWERS}
    return dataclasses.replace(sizes, unet=unet, **towers)


def _depth(unet, stage):
    """Returns the number of transformer blocks in each stack of a stage, such as "up_blocks_1"."""
    if stage == "mid_block":
        return unet.mid_transformer_layers
    kind, _, number = stage.rpartition("_")
    depths = unet.transformer_layers_per_block
    return depths[int(number) if kind == "down_blocks" else -1 - int(number)]


@functools.lru_cache(maxsize=64)
def _traced(sizes, part):
    return flatten(
        jax.eval_shape(functools.partial(Generator(sizes).init_part, part), jax.random.key(0))
    )
