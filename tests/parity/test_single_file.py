"""Single files of the original layout: our names against diffusers' own conversion."""

import jax
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
from focusdpo_jax.diffusion import samplers  # noqa: E402
from focusdpo_jax.errors import UserError  # noqa: E402
from focusdpo_jax.models.generator import Conditioning, Generator  # noqa: E402
from tests.parity import oracles, pipeline, test_samplers  # noqa: E402
from tests.parity.test_diffusers_folder import check_exact, examples  # noqa: E402

PARTS = tuple(single_file.SDXL)


def original_tensors(models, config):
    """The pipeline's tensors under the original names, in the original layouts."""
    tensors = {
        "denoiser.sigmas": np.zeros(3, np.float32),
        "conditioner.embedders.1.model.logit_scale": np.float32(4.6),
    }
    for part in PARTS:
        for name, value in oracles.tensors_of(models[part]).items():
            if part.startswith("text") and not name.startswith(("text_model.", "text_proj")):
                name = f"text_model.{name}"  # What transformers 5 drops in memory.
            theirs, _ = original_names.original_tensor(part, name, getattr(config, part))
            if theirs.endswith("text_projection"):
                value = value.T
            elif ".in_proj_" in theirs:
                # Query, key, value, in the order of the model's own modules.
                third = ["q_proj", "k_proj", "v_proj"].index(name.split(".")[-2])
                whole = tensors.setdefault(
                    theirs, np.zeros((3 * len(value), *value.shape[1:]), np.float32)
                )
                whole[third * len(value) : (third + 1) * len(value)] = value
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
            dict(torched), remove_prefix=original_names.PREFIXES["text_encoder"]
        ),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(
            models["text_encoder_2"], dict(torched), original_names.PREFIXES["text_encoder_2"]
        ),
    }
    for part, theirs in converted.items():
        expected = {
            name.removeprefix("text_model."): value
            for name, value in oracles.tensors_of(models[part]).items()
        }
        theirs = {name.removeprefix("text_model."): value.numpy() for name, value in theirs.items()}
        assert set(theirs) == set(expected), part
        for name, value in expected.items():
            np.testing.assert_array_equal(theirs[name], value)


def test_every_part_bit_for_bit(file):
    path, models, config, _ = file
    shapes = examples(config)
    for part in PARTS:
        params = single_file.load_part(
            path, part, shapes[part], getattr(config, part), dtype=np.float32
        )
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
    with pytest.raises(
        UserError,
        match="x.safetensors, vae, does not fit .* 1 missing: "
        "quant_conv.bias; 1 unexpected: first_stage_model.loss",
    ):
        load(changed)
    with pytest.raises(UserError, match="x.safetensors does not fit .* 1 unexpected: cond_stage"):
        load(tensors | {"cond_stage_model.x": np.zeros(1)})


def test_names_at_sdxls_own_sizes():
    """As in sd_xl_base_1.0.safetensors."""
    for ours, theirs in {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k": "input_blocks.5.1.transformer_blocks.1.attn2.to_k",
        "down_blocks.2.resnets.1.conv_shortcut": "input_blocks.8.0.skip_connection",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.norm2": "output_blocks.8.0.out_layers.0",
    }.items():
        assert original_names.unet_module(ours, single_file.SDXL["unet"]) == theirs


MARKED = [
    ((), {}, ("epsilon", False)),
    ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
    (("v_pred",), {}, ("v_prediction", False)),
    (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
    (("ztsnr",), {"modelspec.prediction_type": "v"}, ("v_prediction", True)),
    (("v_pred",), {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
]


def marked(path, tensors, markers, metadata):
    tensor_file.write(path, tensors | {name: np.zeros(0, np.float32) for name in markers}, metadata)
    return path


@pytest.fixture
def beside(file):
    """What a single file needs beside it."""
    folder = file[0].parent
    return {"image_encoder": folder / "image_encoder", "tokenizer": folder / "tokenizer"}


@pytest.fixture
def small(file, monkeypatch):
    """As if the small sizes were SDXL's."""
    monkeypatch.setattr(
        single_file, "SDXL", {part: getattr(file[2], part) for part in single_file.SDXL}
    )


@pytest.mark.parametrize("markers, metadata, expected", MARKED)
def test_prediction_type_of_a_file(
    file, beside, small, tmp_path, markers, metadata, expected, caplog
):
    _, models, config, tensors = file
    path = marked(tmp_path / "v.safetensors", tensors, markers, metadata)
    read = single_file.load_config(path, **beside)
    assert (read.prediction_type, read.zero_terminal_snr) == expected
    assert read.spacing.name == ("trailing" if expected[1] else "leading")
    assert ("read as v" in caplog.text) == (bool(markers) and "epsilon" in metadata.values())
    unet = single_file.load_part(path, "unet", examples(config)["unet"], config.unet)
    check_exact(unet, models["unet"])
    for kind in single_file.PREDICTION_TYPES:  # The field has the last word.
        read = single_file.load_config(path, prediction_type=kind, **beside)
        assert single_file.prediction(kind) == {
            name: getattr(read, name) for name in ("prediction_type", "zero_terminal_snr")
        }


def test_contradictions_are_named(file, beside, small, tmp_path):
    path = tmp_path / "v.safetensors"
    for markers, metadata, reason in (
        (("ztsnr",), {}, "has a tensor ztsnr"),
        ((), {"modelspec.prediction_type": "edm"}, "modelspec.prediction_type = 'edm'"),
    ):
        marked(path, file[3], markers, metadata)
        with pytest.raises(UserError, match=f"v.safetensors {reason}|{reason}") as error:
            single_file.load_config(path, **beside)
        assert "config.model.prediction_type" in str(error.value)
        read = single_file.load_config(path, prediction_type="v_prediction_zero_snr", **beside)
        assert read.zero_terminal_snr


@pytest.mark.parametrize(
    "markers, sampler, spacing",
    [
        (("v_pred",), "euler", "leading"),
        (("v_pred", "ztsnr"), "ddim", "trailing"),
        (("v_pred", "ztsnr"), "euler", "trailing"),
    ],
)
def test_images_of_v_prediction(file, beside, small, tmp_path, markers, sampler, spacing):
    """Latents of diffusers' loop with the same UNet, its scheduler configured for v prediction and zero SNR."""
    _, models, config, tensors = file
    path = marked(tmp_path / "v.safetensors", tensors, markers, {})
    generator = Generator(single_file.load_config(path, **beside))
    draw = np.random.default_rng(0)
    noise, text, pooled = (
        draw.normal(size=shape).astype(np.float32) for shape in ((1, 8, 8, 4), (1, 16, 24), (1, 20))
    )
    ids = np.float32([[16, 16, 0, 0, 16, 16]])
    theirs = test_samplers.scheduler(
        sampler,
        timestep_spacing=spacing,
        prediction_type="v_prediction",
        rescale_betas_zero_snr="ztsnr" in markers,
        **({"set_alpha_to_one": False} if sampler == "ddim" else {}),
    )
    theirs.set_timesteps(4)
    latents = oracles.nchw(noise) * theirs.init_noise_sigma
    with torch.no_grad():
        for t in theirs.timesteps:
            predicted = models["unet"](
                theirs.scale_model_input(latents, t),
                t,
                torch.from_numpy(text),
                added_cond_kwargs={
                    "text_embeds": torch.from_numpy(pooled),
                    "time_ids": torch.from_numpy(ids),
                },
            ).sample
            latents = theirs.step(predicted, t, latents).prev_sample
    parameters = {
        "unet": single_file.load_part(path, "unet", examples(config)["unet"], config.unet)
    }
    conditioning = Conditioning(
        text=text,
        pooled=pooled,
        time_ids=ids,
        image_tokens=np.zeros((1, 1, 2, 24), np.float32),
        image_present=np.zeros((1, 1), bool),
    )
    found = jax.jit(
        lambda z: samplers.sample(
            lambda x, t: generator.denoise(parameters, x, t, conditioning)[0],
            generator.schedule,
            z,
            4,
            generator.config.spacing,
            sampler=sampler,
        )
    )(noise)
    # At zero SNR diffusers' Euler begins at alpha = 2^-12, and not at 0.
    expected = latents.numpy().transpose(0, 2, 3, 1)
    assert oracles.relative_error(found, expected) < (1e-3 if "ztsnr" in markers else 1e-4)
