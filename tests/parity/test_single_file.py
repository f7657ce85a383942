"""Single files of the original layout: our names against diffusers' own conversion."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is PyTorch's")
pytest.importorskip("diffusers", reason="the oracle is diffusers' conversion")

import torch  # noqa: E402
from diffusers.loaders import single_file_utils  # noqa: E402

from focusdpo_jax.checkpoints import (  # noqa: E402
    diffusers_folder,
    original_names,
    single_file,
    tensor_file,
)
from focusdpo_jax.errors import UserError  # noqa: E402
from tests.parity import oracles, pipeline  # noqa: E402
from tests.parity.test_diffusers_folder import check_exact, examples  # noqa: E402

PARTS = tuple(single_file.SDXL)


def original_tensors(models, config):
    """The pipeline's tensors under the original names, in the original layouts."""
    tensors = {"denoiser.sigmas": np.zeros(3, np.float32),
               "conditioner.embedders.1.model.logit_scale": np.float32(4.6)}
    for part in PARTS:
        for name, value in oracles.tensors_of(models[part]).items():
            if part.startswith("text") and not name.startswith(("text_model.", "text_proj")):
                name = f"text_model.{name}"  # What transformers 5 drops in memory.
            theirs, _ = original_names.original(part, name, getattr(config, part))
            if theirs.endswith("text_projection"):
                value = value.T
            elif ".in_proj_" in theirs:
                # Query, key, value, in the order of the model's own modules.
                third = ["q_proj", "k_proj", "v_proj"].index(name.split(".")[-2])
                whole = tensors.setdefault(
                    theirs, np.zeros((3 * len(value), *value.shape[1:]), np.float32))
                whole[third * len(value):(third + 1) * len(value)] = value
                continue
            elif ".mid.attn_1." in theirs and value.ndim == 2:
                value = value[:, :, None, None]
            assert theirs not in tensors
            tensors[theirs] = np.ascontiguousarray(value)
    return tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    models = pipeline.parts()
    pipeline.save(folder, models)
    config = diffusers_folder.load_config(folder)
    tensors = original_tensors(models, config)
    tensor_file.write(folder / "sdxl.safetensors", tensors)
    return folder / "sdxl.safetensors", models, config, tensors


def test_diffusers_converts_our_names_to_the_same_model(file):
    _, models, _, tensors = file
    torched = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    unet, vae = models["unet"], models["vae"]
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(torched), unet.config),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(torched), vae.config),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(
            dict(torched), remove_prefix=original_names.PREFIXES["text_encoder"]),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(
            models["text_encoder_2"], dict(torched), original_names.PREFIXES["text_encoder_2"])}
    for part, theirs in converted.items():
        expected = {name.removeprefix("text_model."): value for name, value
                    in oracles.tensors_of(models[part]).items()}
        theirs = {name.removeprefix("text_model."): value.numpy() for name, value
                  in theirs.items()}
        assert set(theirs) == set(expected), part
        for name, value in expected.items():
            np.testing.assert_array_equal(theirs[name], value)


def test_every_part_bit_for_bit(file):
    path, models, config, _ = file
    shapes = examples(config)
    for part in PARTS:
        params = single_file.load_part(path, part, shapes[part], getattr(config, part),
                                       dtype=np.float32)
        check_exact(params, models[part])


def test_misfits_are_named(file, tmp_path):
    _, _, config, tensors = file
    shapes = examples(config)["vae"]
    path = tmp_path / "x.safetensors"

    def load(changed):
        tensor_file.write(path, changed)
        return single_file.load_part(path, "vae", shapes, config.vae)

    changed = dict(tensors)
    changed["first_stage_model.loss.weight"] = changed.pop("first_stage_model.quant_conv.bias")
    with pytest.raises(UserError, match="x.safetensors, vae, does not fit .* 1 missing: "
                                        "quant_conv.bias; 1 unexpected: first_stage_model.loss"):
        load(changed)
    with pytest.raises(UserError, match="x.safetensors does not fit .* 1 unexpected: cond_stage"):
        load(tensors | {"cond_stage_model.x": np.zeros(1)})


def test_names_at_sdxls_own_sizes():
    """As in sd_xl_base_1.0.safetensors."""
    for ours, theirs in {
            "conv_in": "input_blocks.0.0",
            "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
            "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k":
                "input_blocks.5.1.transformer_blocks.1.attn2.to_k",
            "down_blocks.2.resnets.1.conv_shortcut": "input_blocks.8.0.skip_connection",
            "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
            "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
            "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
            "up_blocks.2.resnets.2.norm2": "output_blocks.8.0.out_layers.0"}.items():
        assert original_names.unet_module(ours, single_file.SDXL["unet"]) == theirs
