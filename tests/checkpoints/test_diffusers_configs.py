import dataclasses

import pytest

from focusdpo_jax.checkpoints import diffusers_configs as configs
from focusdpo_jax.checkpoints import model_folder
from focusdpo_jax.checkpoints.single_file import SDXL
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.training.models import shipped

# Of stabilityai/stable-diffusion-xl-base-1.0, the fields that tell its sizes.
PUBLISHED = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "num_attention_heads": None,
    "out_channels": 4, "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10], "upcast_attention": None,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True}


def test_sdxls_published_unet():
    assert configs.read_unet(PUBLISHED, "x") == UNetConfig()
    written = configs.write_unet(UNetConfig(), 128)
    for name, value in PUBLISHED.items():
        assert written[name] == value or name == "upcast_attention"
    assert written["sample_size"] == 128


def test_what_is_written_is_read():
    toybox = model_folder.load_config(shipped("toybox"))
    vision = CLIPVisionConfig(projection_dim=None)
    for parts in (SDXL | {"image_encoder": vision}, vars(toybox)):
        unet = dataclasses.replace(parts["unet"], image_context=False)
        assert configs.read_unet(configs.write_unet(unet, 8), "x") == unet
        assert configs.read_vae(configs.write_vae(parts["vae"], 64), "x") == parts["vae"]
        for part in ("text_encoder", "text_encoder_2"):
            assert configs.read_clip_text(configs.write_clip_text(parts[part]), "x") == parts[part]
        encoder = parts["image_encoder"]
        assert configs.read_clip_vision(configs.write_clip_vision(encoder), "x") == encoder
    for noise in (("epsilon", False), ("v_prediction", True)):
        assert tuple(configs.read_scheduler(configs.write_scheduler(*noise), "x").values()) == noise


@pytest.mark.parametrize("depths, mid", [((0, 1), 2), ((0, 1), 0), ((0, 0), 0)])
def test_unets_that_diffusers_does_not_know(depths, mid):
    config = UNetConfig(block_out_channels=(32, 64), transformer_layers_per_block=depths,
                        mid_transformer_layers=mid, num_heads=(1, 2))
    with pytest.raises(UserError, match=f"mid_transformer_layers = {mid}: diffusers knows only"):
        configs.write_unet(config, 8)
