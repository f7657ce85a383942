import dataclasses
import inspect
import re

import pytest

from focusdpo_jax.checkpoints import diffusers_configs as configs
from focusdpo_jax.checkpoints import model_folder
from focusdpo_jax.checkpoints.single_file import SDXL
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.generator import GeneratorConfig
from focusdpo_jax.models.unet import UNetConfig
from focusdpo_jax.training.models import shipped

# Of stabilityai/stable-diffusion-xl-base-1.0, the fields with its sizes.
PUBLISHED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "upcast_attention": None,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


def test_sdxls_published_unet():
    assert configs.read_unet(PUBLISHED, "x") == UNetConfig()
    written = configs.write_unet(UNetConfig(), 128)
    for name, value in PUBLISHED.items():
        assert written[name] == value or name == "upcast_attention"
    assert written["sample_size"] == 128


def test_written_configs_are_read_back():
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
    for noise in (
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing", "steps_offset": 0},
        {"timestep_spacing": "linspace", "set_alpha_to_one": False},
        {
            "prediction_type": "v_prediction",
            "zero_terminal_snr": True,
            "timestep_spacing": "leading",
        },
    ):
        config = dataclasses.replace(toybox, prediction_type="epsilon", zero_terminal_snr=False)
        config = dataclasses.replace(config, **noise)
        read = configs.read_scheduler(configs.write_scheduler(config), "x")
        read = dataclasses.replace(config, **read)
        assert read.spacing == config.spacing
        assert (read.prediction_type, read.zero_terminal_snr) == (
            config.prediction_type,
            config.zero_terminal_snr,
        )
        assert GeneratorConfig.from_json(config.to_json()) == config
    # Shipped and older files have none of these fields, and are written unchanged.
    assert "timestep_spacing" not in toybox.to_json() and toybox.spacing.name == "trailing"


# Of stabilityai/stable-diffusion-xl-base-1.0.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def test_sdxls_published_scheduler():
    assert configs.read_scheduler(SCHEDULER, "x") == {
        "prediction_type": "epsilon",
        "zero_terminal_snr": False,
        "timestep_spacing": None,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    silent = {name: SCHEDULER[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    assert configs.read_scheduler(silent, "x") == {
        "prediction_type": "epsilon",
        "zero_terminal_snr": False,
        "timestep_spacing": None,
        "steps_offset": 0,
        "set_alpha_to_one": True,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_type": "continuous"},
        {"sigma_min": 0.002},
        {"sigma_max": 80.0},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"trained_betas": [0.1, 0.2]},
        {"prediction_type": "sample"},
        {"prediction_type": "v"},
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"clip_sample": True},
        {"thresholding": True},
        {"timestep_spacing": "even"},
        {"steps_offset": -1},
        {"rescale_betas_zero_snr": True},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "LCMScheduler"},
        {"_class_name": "TCDScheduler"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 50},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"},
    ],
    ids=lambda change: list(change)[-1],
)
def test_scheduler_values_that_are_not_implemented(change):
    name, value = list(change.items())[-1]
    with pytest.raises(UserError, match=f"x .*{name} = {re.escape(repr(value))}"):
        configs.read_scheduler(SCHEDULER | change, "x")


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_file_that_does_not_state_clip_sample_has_the_default_of_its_class(name):
    silent = {key: value for key, value in SCHEDULER.items() if key != "clip_sample"}
    configs.read_scheduler(silent, "x")
    with pytest.raises(UserError, match=f"clip_sample = True, the default of {name}"):
        configs.read_scheduler(silent | {"_class_name": name}, "x")


def test_classes_and_their_defaults_are_diffusers_own():
    diffusers = pytest.importorskip("diffusers", reason="whose defaults they are")
    clip = {
        name
        for name in configs.SCHEDULERS
        if "clip_sample" in (parameters := inspect.signature(getattr(diffusers, name)).parameters)
        and parameters["clip_sample"].default
    }
    assert clip == set(configs._CLIP_SAMPLES)
    for name, spacing in configs.SCHEDULERS.items():
        default = inspect.signature(getattr(diffusers, name)).parameters.get("timestep_spacing")
        assert default is None or default.default == spacing, name


@pytest.mark.parametrize("depths, mid", [((0, 1), 2), ((0, 1), 0), ((0, 0), 0)])
def test_unets_that_diffusers_does_not_support(depths, mid):
    config = UNetConfig(
        block_out_channels=(32, 64),
        transformer_layers_per_block=depths,
        mid_transformer_layers=mid,
        num_heads=(1, 2),
    )
    with pytest.raises(UserError, match=f"mid_transformer_layers = {mid}: diffusers supports only"):
        configs.write_unet(config, 8)
