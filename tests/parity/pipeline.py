"""A tiny SDXL pipeline of random weights, each part saved by the library whose class it is."""

import diffusers
import transformers

from focusdpo_jax.models.tokenizer import write_vocabulary
from tests.parity import oracles, test_unet

RESOLUTION = 32
TOWER = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
WORDS = ["a", "red", "boat"]


def parts(vocabulary=1000):
    """{part: PyTorch model} that fit together; the UNet is `test_unet.SMALL`."""
    text = dict(
        vocab_size=vocabulary,
        max_position_embeddings=16,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=1,
        **TOWER,
    )
    return {
        "unet": test_unet.peer(test_unet.SMALL),
        "vae": oracles.randomised(
            diffusers.AutoencoderKL,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 12),
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.13025,
        ),
        "text_encoder": oracles.randomised(
            transformers.CLIPTextModel, transformers.CLIPTextConfig(hidden_size=8, **text)
        ),
        "text_encoder_2": oracles.randomised(
            transformers.CLIPTextModelWithProjection,
            transformers.CLIPTextConfig(
                hidden_size=16, hidden_act="gelu", projection_dim=20, **text
            ),
        ),
        "image_encoder": oracles.randomised(
            transformers.CLIPVisionModelWithProjection,
            transformers.CLIPVisionConfig(
                image_size=20,
                patch_size=5,
                hidden_size=14,
                hidden_act="gelu",
                projection_dim=12,
                **TOWER,
            ),
        ),
    }


def save(folder, models, **how):
    """Writes a pipeline's folder; `how` goes to every `save_pretrained`."""
    write_vocabulary(folder / "tokenizer", WORDS)
    for name, model in models.items():
        model.save_pretrained(folder / name, **how)
    diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
