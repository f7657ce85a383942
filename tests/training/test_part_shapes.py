import dataclasses
import functools

import jax
import pytest
import tiny
from flax import traverse_util

from focusdpo_jax.models.generator import PARTS, Generator, GeneratorConfig
from focusdpo_jax.training.part_shapes import part_shapes

# Stacks of every length, unlike on every level.
UNET = {
    "block_out_channels": (8, 8, 16),
    "transformer_layers_per_block": (0, 1, 3),
    "mid_transformer_layers": 2,
    "num_heads": (2, 2, 2),
}


@pytest.mark.parametrize("changes", [{"scan_layers": True}, {"scan_layers": False, "lora_rank": 2}])
def test_shapes_are_those_of_the_parameters(changes):
    sizes = GeneratorConfig.from_dict(tiny.SIZES)
    sizes = dataclasses.replace(
        sizes,
        unet=dataclasses.replace(sizes.unet, **UNET, **changes),
        **{
            name: dataclasses.replace(getattr(sizes, name), num_layers=count)
            for name, count in (("text_encoder", 2), ("text_encoder_2", 3), ("image_encoder", 4))
        },
    )
    for part in PARTS:
        init = functools.partial(Generator(sizes).init_part, part)
        expected = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))
        assert part_shapes(sizes, part) == expected, part
