"""Pipelines written by diffusers and transformers, read by this package."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

pytest.importorskip("torch", reason="the files are PyTorch's")
diffusers = pytest.importorskip("diffusers", reason="the files are diffusers'")

import safetensors.numpy  # noqa: E402
import transformers  # noqa: E402

from focusdpo_jax import config as config_lib
from focusdpo_jax.checkpoints import (  # noqa: E402
    diffusers_folder,
    ip_adapter,
    model_folder,
    pretrained,
    pytorch_names,
    single_file,
    tensor_file,
)
from focusdpo_jax.diffusion.samplers import Spacing, sampling_timesteps  # noqa: E402
from focusdpo_jax.disruption.inpainting import Inpainter  # noqa: E402
from focusdpo_jax.errors import UserError  # noqa: E402
from focusdpo_jax.models.clip import CLIPTextConfig, CLIPVisionConfig  # noqa: E402
from focusdpo_jax.models.generator import PARTS, Generator  # noqa: E402
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig  # noqa: E402
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary  # noqa: E402
from focusdpo_jax.models.vae import VAEConfig  # noqa: E402
from focusdpo_jax.sharding import mesh as meshes  # noqa: E402
from focusdpo_jax.training import models as training_models  # noqa: E402
from focusdpo_jax.training import preflight, runs  # noqa: E402
from focusdpo_jax.training.models import shipped  # noqa: E402
from tests.models.weights import random_tree  # noqa: E402
from tests.parity import oracles, pipeline, test_unet  # noqa: E402

ADAPTER = SubjectAdapterConfig(
    input_dim=14,
    output_dim=24,
    num_tokens=3,
    width=18,
    depth=2,
    num_heads=2,
    head_dim=8,
    expansion=3,
)
PLAIN = SubjectAdapterConfig(kind="projection", input_dim=12, output_dim=24, num_tokens=4)


@pytest.fixture(scope="module")
def models():
    return pipeline.parts()


@pytest.fixture
def folder(models, tmp_path):
    pipeline.save(tmp_path, models)
    return tmp_path


def examples(config):
    """{part: tree of shapes} of a generator."""
    generator = Generator(config)
    return {
        part: jax.eval_shape(
            lambda key, part=part: generator.init_part(part, key), jax.random.key(0)
        )
        for part in PARTS
    }


def check_exact(params, model):
    """Compares with the model in memory, whose names transformers changes on the way to a file."""
    theirs = oracles.tensors_of(model)
    ours = {
        name: value for name, value in pytorch_names.from_flax(params).items() if "_ip." not in name
    }
    short = {name.removeprefix("text_model."): value for name, value in ours.items()}
    ours = ours if set(ours) == set(theirs) else short
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), theirs[name])


def test_configuration(folder):
    tower = dict(num_layers=2, num_heads=2, intermediate_size=24)
    text = dict(vocab_size=1000, max_length=16, eos_token_id=999, **tower)
    config = diffusers_folder.load_config(folder)
    assert config.unet == dataclasses.replace(test_unet.SMALL, image_context=True)
    assert config.vae == VAEConfig(block_out_channels=(8, 12), layers_per_block=1, norm_groups=4)
    assert config.text_encoder == CLIPTextConfig(hidden_size=8, **text)
    assert config.text_encoder_2 == CLIPTextConfig(
        hidden_size=16, activation="gelu", projection_dim=20, **text
    )
    assert config.image_encoder == CLIPVisionConfig(
        image_size=20, patch_size=5, hidden_size=14, projection_dim=12, **tower
    )
    assert config.adapter == SubjectAdapterConfig(input_dim=14, output_dim=24, dropped="blank")
    assert (config.prediction_type, config.zero_terminal_snr) == ("epsilon", False)
    assert config.zero_empty_prompt


def test_timesteps_are_kept_from_file_to_file(folder, tmp_path):
    """SDXL-Turbo's scheduler: into a model folder of ours, and out again to diffusers."""
    turbo = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="trailing",
    )
    turbo.save_pretrained(folder / "scheduler")
    config = diffusers_folder.load_config(folder)
    assert config.spacing == Spacing("trailing", 1, True)
    assert sampling_timesteps(1000, 1, config.spacing).tolist() == [999]
    (tmp_path / "ours").mkdir()
    model_folder.save_config(tmp_path / "ours", config)
    config = model_folder.load_config(tmp_path / "ours")
    tokenizer = Tokenizer(folder / "tokenizer", 16)
    diffusers_folder.save_pipeline_files(tmp_path / "out", config, tokenizer)
    exported = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    exported.set_timesteps(1)
    assert exported.timesteps.tolist() == [999]


def test_the_field_sets_the_prediction_type(folder):
    """It replaces the value of the scheduler's file, but not that of a model folder."""
    fields = {"pretrained": str(folder), "adapter": "", "image_encoder": "", "tokenizer": ""}
    for kind, spacing in (
        ("", "leading"),
        ("v_prediction", "leading"),
        ("v_prediction_zero_snr", "trailing"),
    ):
        config = pretrained.locate(fields, shipped, kind).config()
        assert config.prediction_type == ("v_prediction" if kind else "epsilon")
        assert config.zero_terminal_snr == (spacing == "trailing")
        assert config.spacing.name == spacing
    with pytest.raises(
        UserError,
        match="config.model.prediction_type = 'epsilon': .* is a model "
        "folder, which has everything; give ''",
    ):
        pretrained.locate(fields | {"pretrained": "toybox"}, shipped, "epsilon")
    for kind in ("", *single_file.PREDICTION_TYPES):
        config_lib.check(tiny.run_config("sdxl_dpo", "", model__prediction_type=kind))


def test_a_scheduler_is_of_the_class_that_the_index_names(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    for name in ("_class_name", "timestep_spacing"):
        del values[name]
    path.write_text(json.dumps(values | {"clip_sample": False}))
    index = folder / "model_index.json"
    for kind, spacing in (("DDIMScheduler", "leading"), ("EulerDiscreteScheduler", "linspace")):
        index.write_text(json.dumps({"scheduler": ["diffusers", kind]}))
        assert diffusers_folder.load_config(folder).spacing.name == spacing
    index.write_text(json.dumps({"scheduler": ["diffusers", "LCMScheduler"]}))
    with pytest.raises(UserError, match="scheduler_config.json has _class_name = 'LCMScheduler'"):
        diffusers_folder.load_config(folder)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_shard_size": "20KB"},
        {"variant": "fp16"},
        {"max_shard_size": "20KB", "variant": "fp16"},
    ],
)
def test_every_part_bit_for_bit(models, how, tmp_path):
    pipeline.save(tmp_path, models, **how)
    shards = len(list((tmp_path / "unet").glob("*.safetensors")))
    assert shards > 1 if "max_shard_size" in how else shards == 1
    expected = examples(diffusers_folder.load_config(tmp_path))
    for part, model in models.items():
        check_exact(diffusers_folder.load_part(tmp_path, part, expected[part]), model)
    assert diffusers_folder.load_part(tmp_path, "adapter", expected["adapter"]) is None
    if "variant" in how:
        with pytest.raises(UserError, match="lacks unet/diffusion_pytorch_model.fp32.safetensors"):
            diffusers_folder.load_config(tmp_path, variant="fp32")


def test_a_pipeline_that_transformers_5_saves(models, tmp_path):
    """Its tokenizers have only tokenizer.json; the padding token is in another file."""
    words = write_vocabulary(tmp_path / "words", pipeline.WORDS)
    parts = pipeline.parts(vocabulary=words)
    tokenizers = {
        name: transformers.CLIPTokenizer(
            vocab=str(tmp_path / "words/vocab.json"),
            merges=str(tmp_path / "words/merges.txt"),
            pad_token=padding,
            model_max_length=16,
        )
        for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))
    }
    diffusers.StableDiffusionXLPipeline(
        **parts,
        **tokenizers,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        feature_extractor=None,
    ).save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*/vocab.json"))
    model = runs.load_folder(tmp_path / "saved")
    for caption in ("a red boat!", "", "a boat " * 20):
        np.testing.assert_array_equal(
            model.tokenizer(caption),
            [
                tokenizer(caption, padding="max_length", max_length=16, truncation=True)[
                    "input_ids"
                ]
                for tokenizer in tokenizers.values()
            ],
        )
    training_models.save_model(tmp_path / "model", model, model.parameters)
    again = Tokenizer(tmp_path / "model/tokenizer", 16)
    np.testing.assert_array_equal(again("a red boat!"), model.tokenizer("a red boat!"))


def test_a_new_image_branch_reads_as_the_text_does(folder):
    expected = examples(diffusers_folder.load_config(folder))["unet"]
    params = diffusers_folder.load_part(folder, "unet", expected)
    attention = params["down_blocks_1"]["attentions_0"]["transformer_blocks"]["attn2"]
    assert attention["to_k_ip"]["kernel"].shape == (1, 24, 24)
    for name in ("to_k", "to_v"):
        np.testing.assert_array_equal(attention[f"{name}_ip"]["kernel"], attention[name]["kernel"])


@pytest.mark.parametrize("adapter", [ADAPTER, PLAIN], ids=lambda config: config.kind)
def test_adapter_file(folder, adapter):
    config = dataclasses.replace(diffusers_folder.load_config(folder), adapter=adapter)
    expected = examples(config)
    parameters = {
        "unet": random_tree(expected["unet"]),
        "adapter": random_tree(expected["adapter"]),
    }
    diffusers_folder.save_adapter(folder, parameters, config)
    assert diffusers_folder.load_config(folder) == config
    adapter = diffusers_folder.load_part(folder, "adapter", expected["adapter"])
    jax.tree.map(np.testing.assert_array_equal, adapter, parameters["adapter"])
    unet = diffusers_folder.load_part(folder, "unet", expected["unet"])
    branch = unet["mid_block"]["attentions_0"]["transformer_blocks"]["attn2"]["to_v_ip"]
    theirs = parameters["unet"]["mid_block"]["attentions_0"]["transformer_blocks"]["attn2"]
    np.testing.assert_array_equal(branch["kernel"], theirs["to_v_ip"]["kernel"])


def test_sizes_are_read_from_plain_adapter_files():
    shapes = {
        "image_proj.proj.weight": np.zeros((4 * 24, 12)),
        "image_proj.norm.weight": np.zeros(24),
        "ip_adapter.1.to_k_ip.weight": np.zeros((8, 24)),
    }
    assert ip_adapter.read_config(shapes, {}) == SubjectAdapterConfig(
        kind="projection", input_dim=12, output_dim=24, num_tokens=4, dropped="blank"
    )
    with pytest.raises(UserError, match="x.safetensors is neither of IP-Adapter's layout"):
        ip_adapter.read_config({"unet.weight": np.zeros(2)}, {}, "x.safetensors")


def test_types_and_shards(folder, models):
    expected = examples(diffusers_folder.load_config(folder))["vae"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    each = jax.tree.map(lambda leaf: sharding, expected)
    plain = diffusers_folder.load_part(folder, "vae", expected)
    for target in (sharding, each):
        params = diffusers_folder.load_part(
            folder, "vae", expected, dtype=jnp.bfloat16, sharding=target
        )
        for leaf, exact in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
            assert isinstance(leaf, jax.Array) and leaf.sharding == sharding
            np.testing.assert_array_equal(leaf, exact.astype(ml_dtypes.bfloat16))


def test_half_precision_files(folder, models):
    """What a real fp16 variant holds."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {
        name: value.astype(np.float16) for name, value in oracles.tensors_of(models["unet"]).items()
    }
    path.unlink()
    safetensors.numpy.save_file(tensors, path.with_suffix(".fp16.safetensors"))
    expected = examples(diffusers_folder.load_config(folder))["unet"]
    params = diffusers_folder.load_part(folder, "unet", expected, dtype=np.float32)
    assert params["conv_in"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["conv_in"]["bias"], tensors["conv_in.bias"])


def test_misfits_are_named(folder):
    expected = examples(diffusers_folder.load_config(folder))["unet"]
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, _ = tensor_file.read(path)
    del tensors["conv_in.bias"]
    tensors["conv_out.bias"] = np.zeros(5, np.float32)
    tensors["class_embedding.weight"] = np.zeros(3, np.float32)
    tensor_file.write(path, tensors)
    with pytest.raises(UserError) as error:
        diffusers_folder.load_part(folder, "unet", expected)
    assert str(error.value) == (
        f"{folder}/unet does not fit the configured model: 1 missing: conv_in.bias; "
        "1 unexpected: class_embedding.weight; "
        "1 of another shape: conv_out.bias is (5,), not (4,)"
    )


def test_missing_files_are_listed(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.bin"
    )
    shutil.rmtree(folder / "image_encoder")
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError) as error:
        diffusers_folder.load_config(folder)
    assert str(error.value).startswith(
        f"{folder} lacks image_encoder/config.json, unet/diffusion_pytorch_model.safetensors "
        "(a .bin is a pickle, which is not read: diffusion_pytorch_model.bin), "
        "image_encoder/model.safetensors, tokenizer/merges.txt. Such a folder is normally fetched by "
        "`hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir DIR`"
    )


def test_missing_shards_are_listed(models, tmp_path):
    pipeline.save(tmp_path, models, max_shard_size="20KB")
    shard = sorted((tmp_path / "vae").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks vae/{shard.name}\\. Such a folder"):
        diffusers_folder.load_config(tmp_path)


def test_missing_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nowhere", str(tmp_path / "nowhere"), "someone/no-such-model"):
        assert diffusers_folder.resolve(name) is None
    assert diffusers_folder.resolve(tmp_path) == tmp_path


def test_names_of_the_hub(monkeypatch, tmp_path):
    """With a path in a repository, of what the hub's client has in its cache."""
    commit = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    (commit / "models" / "enc").mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert diffusers_folder.resolve("some/model/models/enc") == commit / "models" / "enc"
    assert diffusers_folder.resolve("some/model") == commit
    assert diffusers_folder.resolve("some/model/models/none") is None


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("unet", "use_linear_projection", False),
        ("unet", "addition_embed_type", "text"),
        ("unet", "time_cond_proj_dim", 256),
        ("vae", "shift_factor", 0.1),
        ("text_encoder", "layer_norm_eps", 1e-6),
        ("scheduler", "beta_end", 0.02),
    ],
)
def test_another_kind_of_model_is_refused(folder, part, field, value):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(
        UserError,
        match=rf"{part}/.*json describes a model of another kind than "
        rf"SDXL's: {field} = {value!r} \(not",
    ):
        diffusers_folder.load_config(folder)


def test_damaged_configurations_are_named(folder):
    path = folder / "vae" / "config.json"
    values = json.loads(path.read_text())
    del values["scaling_factor"]
    for text, reason in (
        ("{", "is damaged"),
        ("[]", "is not a JSON object"),
        (json.dumps(values), "lacks the field 'scaling_factor'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"vae/config.json .*{reason}"):
            diffusers_folder.load_config(folder)


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    """channels(n): a pipeline whose UNet reads n channels."""
    made = {}

    def make(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp(f"channels{count}")
            parts = pipeline.parts(write_vocabulary(made[count] / "words", pipeline.WORDS))
            parts["unet"] = test_unet.peer(dataclasses.replace(test_unet.SMALL, in_channels=count))
            pipeline.save(made[count], parts)
        return made[count]

    return make


def config_of(folder):
    """configs/sdxl_dpo.py on a pipeline."""
    return tiny.run_config("sdxl_dpo", "", model__pretrained=str(folder), resolution=32)


REFUSED = {
    9: "its UNet has 9 input channels (in_channels of its configuration) instead of the 4 of the latents. "
    "Such a UNet is for inpainting, which focusdpo_jax.disrupt --workdir accepts. Give a model whose UNet "
    "has 4.",
    8: "its UNet has 8 input channels (in_channels of its configuration) instead of the 4 of the latents. "
    "Such a UNet is for image editing (InstructPix2Pix). Give a model whose UNet has 4.",
}


@pytest.mark.parametrize("count", REFUSED)
def test_unets_that_read_more_than_latents(count, channels):
    """sample, evaluate, main and plan refuse them."""
    folder = channels(count)
    config = config_of(folder)
    mesh = meshes.make_mesh(config.mesh.sizes, config.batch_size)
    for use in (
        lambda: runs.load_folder(folder),
        lambda: training_models.load_model(config),
        lambda: preflight.check(config),
        lambda: training_models.abstract_model(config, mesh),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value) == f"{folder}: {REFUSED[count]}"


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("sample", ["--prompt=a red boat", "--resolution=32"]),
        (
            "evaluate",
            ["--config={root}/configs/toybox_dpo.py", "--output={folder}/out", "--limit=1"],
        ),
        ("plan", ["--config={root}/configs/sdxl_dpo.py", "--config.model.pretrained={folder}"]),
        ("main", ["--config={root}/configs/sdxl_dpo.py", "--config.model.pretrained={folder}"]),
    ],
)
def test_commands_refuse_an_inpainting_unet_in_one_line(command, arguments, channels, tmp_path):
    folder = channels(9)
    where = (
        []
        if command == "plan"
        else [f"--workdir={folder if command != 'main' else tmp_path / 'run'}"]
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            f"focusdpo_jax.{command}",
            *where,
            *(argument.format(root=tiny.ROOT, folder=folder) for argument in arguments),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {folder}: {REFUSED[9]}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_disruption_takes_unets_of_both_kinds(channels):
    """Of 9 channels and of 4; one of 8 it refuses."""
    how = {"resolution": 32, "steps": 1, "strength": 1.0, "guidance": 1.0, "batch_size": 1}
    for count in (9, 4, 8):
        model = runs.load_folder(channels(count), inpainting=True)
        if count == 8:
            with pytest.raises(
                UserError, match="the UNet reads 8 channels; disruption needs one that reads"
            ):
                Inpainter(model, **how)
            continue
        picture, mask = np.full((32, 32, 3), 128, np.uint8), np.zeros((32, 32), bool)
        mask[8:24, 8:24] = True
        drawn, _ = Inpainter(model, **how).draw(picture, mask, "a red boat", [0])
        assert np.any(drawn[0][mask] != 128) and np.all(drawn[0][~mask] == 128)


@pytest.mark.parametrize(
    "index, message",
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "is a StableDiffusionPipeline according to its model_index.json, and only SDXL is supported",
        ),
        ({"_class_name": "KolorsPipeline"}, "is a KolorsPipeline"),
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
            r"has no text_encoder \(SDXL's refiner has no first one\) according to its model_index.json",
        ),
    ],
)
def test_pipelines_of_other_kinds_are_named(folder, index, message):
    """Before their missing files are reported, which such pipelines do not have."""
    shutil.rmtree(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps(index))
    for use in (
        lambda: runs.load_folder(folder),
        lambda: training_models.generator_config(config_of(folder)),
        lambda: training_models.abstract_model(config_of(folder), None),
    ):
        with pytest.raises(UserError, match=message):
            use()


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep' .not None"),
        (
            "unet",
            {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"},
            "encoder_hid_dim = 4096 .not None",
        ),
        (
            "unet",
            {"transformer_layers_per_block": [1, [1, 2]]},
            r"transformer_layers_per_block = \[1, \[1, 2\]\]",
        ),
        (
            "unet",
            {"cross_attention_dim": 2048},
            r"unet.cross_attention_dim = 2048, but text_encoder.hidden_size \+ "
            r"text_encoder_2.hidden_size = 24: use parts that belong to one",
        ),
        ("unet", {"in_channels": 3}, "unet.in_channels = 3, but vae.latent_channels = 4"),
        ("unet", {"out_channels": 8}, "unet.out_channels = 8, but vae.latent_channels = 4"),
        ("vae", {"latent_channels": 16}, "unet.out_channels = 4, but vae.latent_channels = 16"),
        (
            "vae",
            {"in_channels": 4, "out_channels": 4},
            "vae.in_channels = 4, but the channels of an RGB image = 3",
        ),
        ("vae", {"shift_factor": 0.1159}, "shift_factor = 0.1159 .not None"),
        (
            "text_encoder_2",
            {"projection_dim": 768},
            "unet.pooled_dim = 20, but text_encoder_2.projection_dim = 768",
        ),
        ("text_encoder", {"hidden_size": 1024}, "unet.cross_attention_dim = 24, but .* = 1040"),
    ],
)
def test_other_architectures_are_named(folder, part, fields, message):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    for use in (
        lambda: runs.load_folder(folder),
        lambda: training_models.abstract_model(config_of(folder), None),
    ):
        with pytest.raises(UserError, match=message):
            use()
