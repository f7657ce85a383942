"""Errors of a run are found before anything is built, from its configuration and file headers."""

import contextlib
import dataclasses
import json
import logging as python_logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from absl import logging as absl_logging
from flax import traverse_util

from focusdpo_jax import toybox
from focusdpo_jax.checkpoints import diffusers_folder, single_file, tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.clip import CLIPVisionConfig
from focusdpo_jax.models.generator import PARTS, GeneratorConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary
from focusdpo_jax.training import builders, loop, memory, models, preflight, run_data
from focusdpo_jax.training.part_shapes import part_shapes

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """sdxl/, a pipeline in diffusers' layout without values; plain.safetensors, an adapter for another."""
    folder = tmp_path_factory.mktemp("published")
    sizes = GeneratorConfig.from_dict(tiny.run_config("sdxl_dpo", "debug").model.sizes)
    trees = zeros(sizes)
    for part in PARTS:
        if part != "adapter":
            diffusers_folder.save_part(folder / "sdxl", part, trees[part], sizes, 64)
    diffusers_folder.save_adapter(folder / "sdxl", trees, sizes)
    tokenizer = Tokenizer.of_words(toybox.vocabulary(), sizes.text_encoder.max_length)
    diffusers_folder.save_pipeline_files(folder / "sdxl", sizes, tokenizer)

    wide = dataclasses.replace(sizes.image_encoder, projection_dim=40)
    plain = SubjectAdapterConfig(kind="projection", input_dim=40, output_dim=64, num_tokens=4)
    other = dataclasses.replace(sizes, image_encoder=wide, adapter=plain)
    diffusers_folder.save_adapter(folder, zeros(other), other)
    (folder / diffusers_folder.ADAPTER).rename(folder / "plain.safetensors")
    return folder


def zeros(sizes):
    """{part: tree of zeros}."""
    return {
        part: traverse_util.unflatten_dict(
            {
                path: np.zeros(leaf.shape, np.float32)
                for path, leaf in part_shapes(sizes, part).items()
            }
        )
        for part in PARTS
    }


@pytest.fixture
def folder(published, tmp_path):
    """A copy of `published` that a test may change."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config_of(folder, **overrides):
    """configs/sdxl_dpo.py for the pipeline in a folder."""
    changes = {
        "resolution": 64,
        "data__path": str(folder / "data"),
        "model__pretrained": str(folder / "sdxl"),
    }
    return tiny.run_config("sdxl_dpo", "", **(changes | overrides))


@contextlib.contextmanager
def log():
    """Yields the list of what is logged meanwhile."""
    records, handler = [], python_logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger, verbosity = python_logging.getLogger("absl"), absl_logging.get_verbosity()
    logger.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        absl_logging.set_verbosity(verbosity)


@pytest.fixture
def refused(monkeypatch):
    """refused(config, folder): the message with which a run ends before it writes or builds anything."""

    def message(config, folder):
        def files():
            return sorted(folder.rglob("*"))

        monkeypatch.setattr(builders, "make_task", lambda *_: pytest.fail("a task is built"))
        monkeypatch.setattr(models, "load_parts", lambda *_: pytest.fail("weights are read"))
        before = files()
        with pytest.raises(UserError) as error, log() as logged:
            loop.run(config, folder / "run")
        assert files() == before
        assert [line for line in logged if line.startswith("checked for ")] == logged[-1:]
        assert logged[-1].endswith(" s; nothing was built")
        return str(error.value)

    return message


def test_a_run_that_can_start_passes(published):
    with log() as logged:
        preflight.check(config_of(published))
    (line,) = [
        line for line in logged if line.startswith("checked configuration, weights and memory in")
    ]
    assert "GB are held on each device before activations, of " in line


def test_missing_weights(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "stabilityai/no-such-model"
    message = refused(config_of(tmp_path, model__pretrained=name), tmp_path)
    assert message.startswith(f"config.model.pretrained = {name!r}: no such file or folder")
    assert "normally fetched by `hf download stabilityai/stable-diffusion-xl-base-1.0" in message


def test_missing_files_of_a_pipeline(refused, folder):
    (folder / "sdxl" / VAE).unlink()
    (folder / "sdxl/tokenizer/vocab.json").unlink()
    assert refused(config_of(folder), folder).startswith(
        f"{folder}/sdxl lacks {VAE}, tokenizer/vocab.json. Such a folder is normally fetched by"
    )


@pytest.mark.parametrize(
    "file", [UNET, "image_encoder/model.safetensors", "ip_adapter.safetensors"]
)
def test_a_truncated_file(refused, folder, file):
    path = folder / "sdxl" / file
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    assert refused(config_of(folder), folder) == (
        f"{path} is not a readable safetensors file (it has {len(content) - 7} bytes and should have "
        f"{len(content)}). It is damaged or incomplete: fetch or copy it again."
    )


def test_an_adapter_of_another_kind(refused, folder):
    adapter = folder / "plain.safetensors"
    message = refused(config_of(folder, model__adapter=str(adapter)), folder)
    assert message.startswith(
        f"{adapter} does not fit the model with the image encoder {folder}/sdxl/image_encoder: "
        "adapter.input_dim = 40, but a subject adapter of kind = 'projection' reads features of width "
        "image_encoder.projection_dim = 32"
    )
    assert "sdxl_models/ip-adapter_sdxl.safetensors with sdxl_models/image_encoder" in message
    assert "Set config.model.adapter and config.model.image_encoder" in message


@pytest.mark.parametrize("argument", ["", "lora", "full"])
def test_preferences_need_an_adapter_that_was_trained(refused, folder, monkeypatch, argument):
    (folder / "sdxl/ip_adapter.safetensors").unlink()
    rank = 2 * (argument == "lora")
    config = config_of(folder, trainable=argument or "adapter", model__lora_rank=rank)
    assert refused(config, folder) == (
        f"config.model.adapter = '': {folder}/sdxl has no adapter. It would be initialised at random, but "
        "focus_dpo needs a trained reference model. Give an IP-Adapter file; a new adapter has to be "
        "trained with config.objective = 'sft' first."
    )
    models.check_files(tiny.changed(config, objective="sft"))


def test_tensors_that_do_not_fit(refused, folder):
    path = folder / "sdxl" / VAE
    tensors, _ = tensor_file.read(path)
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    del tensors["quant_conv.bias"]
    tensors["loss.weight"] = np.zeros(1, np.float32)
    tensors["decoder.conv_out.bias"] = np.zeros(5, np.float32)
    tensor_file.write(path, tensors)
    assert refused(config_of(folder), folder) == (
        f"{folder}/sdxl/vae does not fit the configured model: 1 missing: quant_conv.bias; "
        "1 unexpected: loss.weight; 1 of another shape: decoder.conv_out.bias is (5,), not (3,) "
        f"(config.model.pretrained = '{folder}/sdxl'). Give files that belong to one model."
    )


def test_a_vocabulary_of_other_text_encoders(refused, folder):
    words = write_vocabulary(folder / "sdxl/tokenizer", [f"word{i}x" for i in range(100)])
    assert words > 573
    assert refused(config_of(folder), folder) == (
        f"{folder}/sdxl/tokenizer has a vocabulary of {words} tokens, and the text encoders have 573: set "
        "config.model.tokenizer to the one that they were trained with"
    )


def test_a_resolution_between_latents(refused, published):
    assert refused(config_of(published, resolution=100), published) == (
        "config.resolution = 100: a latent of this model covers 8 pixels in each direction; give a positive "
        "multiple of 8, such as 96"
    )


def test_sampling_steps_beyond_the_schedule(refused, published):
    assert refused(config_of(published, sampling__steps=1000), published) == (
        "config.sampling.steps = 1000: sampling steps is 1000; choose 1 to 999"
    )


@pytest.mark.parametrize("field", ["scenes", "validation_scenes"])
def test_measures_need_a_probe(refused, published, field):
    config = config_of(published, **{f"evaluation__{field}": 2, "data__source": "toybox"})
    assert refused(config, published) == (
        f"config.evaluation.{field} = 2: config.model.pretrained = '{published / 'sdxl'}' has no "
        "probe.safetensors, which measures them; give 0"
    )


def test_devices_that_are_not_there(refused, published):
    assert refused(config_of(published, mesh__fsdp=1000), published).startswith(
        "config.mesh.data = -1, config.mesh.fsdp = 1000, config.mesh.tensor = 1"
    )


@pytest.mark.parametrize(
    "resolution, reason",
    [
        (
            None,
            "config.data.path = '{}' holds no prepared data set; make one with python -m "
            "focusdpo_jax.prepare",
        ),
        (
            32,
            "config.resolution = 64: the images of {} have 32; give that, or prepare them again",
        ),
    ],
)
def test_a_prepared_data_set_comes_before_the_weights(
    refused, folder, monkeypatch, resolution, reason
):
    monkeypatch.setattr(models, "check_files", lambda *_: pytest.fail("headers are read"))
    config, path = config_of(folder, data__source="prepared"), folder / "data"
    if resolution:
        monkeypatch.setattr(
            run_data.dataset, "open_prepared", lambda _: {"train": Prepared(resolution)}
        )
    assert refused(config, folder).startswith(reason.format(path))


class Prepared(list):
    """In the place of a prepared data set."""

    def __init__(self, resolution):
        super().__init__(range(100))
        self.settings = {"resolution": resolution, "subjects": 2}


# --- Memory, at SDXL's own sizes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size():
    """configs/sdxl_dpo.py with random weights, so that no file is needed."""
    sizes = json.loads(
        GeneratorConfig(
            **single_file.SDXL,
            image_encoder=CLIPVisionConfig(projection_dim=1024),
            adapter=SubjectAdapterConfig(),
        ).to_json()
    )
    return tiny.run_config("sdxl_dpo", "", model__pretrained="", model__sizes=sizes)


@pytest.mark.parametrize(
    "gigabytes, cure",
    [
        (
            13.5,
            "give config.data.cache = True (12.8 GB), or config.trainable = 'lora' and "
            "config.model.lora_rank = 32 (10.0 GB)",
        ),
        (
            7.9,
            "give config.data.cache = True and config.trainable = 'lora' and config.model.lora_rank = 32 "
            "(6.8 GB)",
        ),
        (
            2.0,
            "even with config.data.cache = True and config.trainable = 'lora' and "
            "config.model.lora_rank = 32 it is 6.8 GB; use devices with more memory, or more of them "
            "with config.mesh.fsdp",
        ),
    ],
)
def test_too_little_memory(refused, full_size, monkeypatch, tmp_path, gigabytes, cure):
    monkeypatch.setattr(memory, "limit", lambda device: int(gigabytes * 1e9))
    assert refused(full_size, tmp_path) == (
        "config.trainable = 'adapter' with config.batch_size = 8 and config.data.cache = False holds "
        "16.0 GB on each device before activations (frozen parameters 5.1, encoders 3.1, reference "
        "0.8, trained parameters 1.7, optimizer 5.1, images 0.1), and cpu has "
        f"{gigabytes:.1f} GB: {cure}"
    )


def test_nothing_is_refused_if_the_memory_is_unknown(published, monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda device: None)
    preflight.check(config_of(published))


def test_the_command_prints_the_error_in_one_line(folder):
    path = folder / "sdxl" / UNET
    path.write_bytes(path.read_bytes()[:-1])
    before = sorted(folder.rglob("*"))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "focusdpo_jax.main",
            f"--config={tiny.ROOT / 'configs' / 'sdxl_dpo.py'}",
            f"--config.model.pretrained={folder / 'sdxl'}",
            "--config.resolution=64",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith(f"error: {path} is not a readable safetensors file (it has")
    assert lines[-2].endswith("s; nothing was built")
    assert sorted(folder.rglob("*")) == before


def test_the_outline_of_the_default_run():
    config = tiny.run_config("toybox_dpo")
    assert preflight.outline(config) == (
        "focus_dpo on toybox, 96 steps of 16; 8 validation scenes generated at the end; "
        "then 256 test scenes generated by base and policy and measured. The log shows the time left"
    )
    assert "; 8 validation scenes generated every 40 steps and at the end; " in preflight.outline(
        tiny.changed(config, sample_every=40)
    )
    config = tiny.changed(config, objective="probe", accumulate=2, steps=5)
    assert preflight.outline(config) == (
        "probe on toybox, 5 steps of 16 times 2. The log shows the time left"
    )
