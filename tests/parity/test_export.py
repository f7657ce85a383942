"""Exports of a run, loaded by diffusers and read again by this package."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

pytest.importorskip("torch", reason="the files are for PyTorch's diffusers")
diffusers = pytest.importorskip("diffusers", reason="the files are for diffusers")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

from focusdpo_jax import config as config_lib
from focusdpo_jax.checkpoints import (  # noqa: E402
    diffusers_folder,
    lora,
    model_folder,
    pytorch_names,
    run_export,
    tensor_file,
)
from focusdpo_jax.errors import UserError  # noqa: E402
from focusdpo_jax.inference.generate import make_generate
from focusdpo_jax.models.clip import CLIPTextConfig, CLIPVisionConfig  # noqa: E402
from focusdpo_jax.models.generator import PARTS, Generator, GeneratorConfig  # noqa: E402
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig  # noqa: E402
from focusdpo_jax.models.tokenizer import Tokenizer, write_vocabulary  # noqa: E402
from focusdpo_jax.models.vae import VAEConfig  # noqa: E402
from focusdpo_jax.training import (  # noqa: E402
    export_check,  # noqa: E402
    models,
    runs,
)
from tests.models.weights import random_tree  # noqa: E402
from tests.parity import oracles, test_unet  # noqa: E402
from tests.parity.test_diffusers_folder import check_exact, examples  # noqa: E402

TEXT = dict(max_length=16, num_layers=2, num_heads=2, intermediate_size=24)
VISION = CLIPVisionConfig(
    image_size=20,
    patch_size=5,
    hidden_size=14,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    projection_dim=12,
)
# Depth 4 and heads of 64 channels are what diffusers' loader takes for granted.
ADAPTER = SubjectAdapterConfig(
    input_dim=14,
    output_dim=24,
    num_tokens=3,
    width=18,
    depth=4,
    num_heads=2,
    head_dim=64,
    dropped="blank",
)
RUN = {
    "objective": "focus_dpo",
    "trainable": "full",
    "resolution": 32,
    "steps": 4,
    "seed": 0,
    "model": {"pretrained": "toybox", "lora_rank": 0},
    "data": {"path": "data", "seed": 7, "train_size": 12},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A finished run of random weights with low-rank updates, and its whole export."""
    return export_of(tmp_path_factory.mktemp("run"))


def export_of(folder, dtype="float32"):
    """The export of a run in `folder`, which keeps its parameters as one of that type does."""
    size = write_vocabulary(folder / "model" / "tokenizer", ["a", "red", "boat"])
    text = dict(vocab_size=size, eos_token_id=size - 1, **TEXT)
    config = GeneratorConfig(
        unet=dataclasses.replace(test_unet.SMALL, image_context=True, lora_rank=4, lora_alpha=8.0),
        vae=VAEConfig(block_out_channels=(8, 12), layers_per_block=1, norm_groups=4),
        text_encoder=CLIPTextConfig(hidden_size=8, **text),
        text_encoder_2=CLIPTextConfig(hidden_size=16, activation="gelu", projection_dim=20, **text),
        image_encoder=VISION,
        adapter=ADAPTER,
        prediction_type="v_prediction",
        zero_terminal_snr=True,
    )
    shapes = examples(config)
    parameters = {part: random_tree(shapes[part], seed) for seed, part in enumerate(PARTS)}
    run = config_lib.RunConfig(dtype=dtype)
    parameters = {
        part: traverse_util.unflatten_dict(
            {
                path: leaf.astype(models.stored_type(run, (part, *path), leaf.shape))
                for path, leaf in traverse_util.flatten_dict(tree).items()
            }
        )
        for part, tree in parameters.items()
    }
    for part, tree in parameters.items():
        model_folder.save_part(folder / "model", part, tree)
    model_folder.save_config(folder / "model", config)
    (folder / "config.json").write_text(json.dumps(RUN | {"dtype": dtype}))
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n{"step": 4, "loss": 0.25}\n')
    names = run_export.export_run(folder, folder / "out", whole=True)
    assert names == (*PARTS, "lora")
    return folder / "out", config, parameters


@pytest.fixture(scope="module")
def pipe(exported):
    """The pipeline that diffusers makes of the folder alone."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(exported[0])
    pipe.load_ip_adapter(
        exported[0], subfolder="", weight_name=diffusers_folder.ADAPTER, image_encoder_folder=None
    )
    return pipe


def test_diffusers_has_every_tensor(exported, pipe):
    out, config, parameters = exported
    flat = traverse_util.flatten_dict(parameters["unet"])
    theirs = oracles.tensors_of(pipe.unet)
    for path, leaf in flat.items():
        if path[-1] not in ("lora_a", "lora_b"):
            ((name, value),) = pytorch_names.from_flax(
                traverse_util.unflatten_dict({path: leaf})
            ).items()
            np.testing.assert_array_equal(theirs.pop(name), value)
    prefix = "encoder_hid_proj.image_projection_layers.0."
    adapter = pytorch_names.from_flax(parameters["adapter"])
    assert set(theirs) == {prefix + name for name in adapter}
    for name, value in adapter.items():
        np.testing.assert_array_equal(theirs[prefix + name], value)
    for part in ("vae", "text_encoder", "text_encoder_2", "image_encoder"):
        check_exact(parameters[part], getattr(pipe, part))


def test_diffusers_reads_the_surroundings(exported, pipe):
    out, _, _ = exported
    scheduler = pipe.scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.rescale_betas_zero_snr
    assert pipe.feature_extractor.crop_size["height"] == 20
    assert (pipe.default_sample_size, pipe.vae_scale_factor) == (16, 2)
    ours = Tokenizer(out / "tokenizer", 16)
    for caption in ("a red boat", "", "Two zebras, in a VERY long sentence; 12 words? or more!"):
        ids = [
            tokenizer(
                caption,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
            ).input_ids
            for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
        ]
        np.testing.assert_array_equal(ours(caption), ids)


@pytest.mark.parametrize("name, padding", [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_transformers_reads_the_tokenizers(exported, name, padding, tmp_path):
    """By themselves, and what it saves of them is read again."""
    theirs = transformers.AutoTokenizer.from_pretrained(exported[0] / name)
    assert (type(theirs).__name__, theirs.pad_token) == ("CLIPTokenizer", padding)
    theirs.save_pretrained(tmp_path)
    ours, again = Tokenizer(exported[0] / "tokenizer", 16), Tokenizer(tmp_path, 16)
    for caption in ("a red boat!", "", "Two zebras; 12 words? or more!"):
        ids = theirs(caption, padding="max_length", max_length=16, truncation=True)["input_ids"]
        np.testing.assert_array_equal(ours(caption)[["tokenizer", "tokenizer_2"].index(name)], ids)
        np.testing.assert_array_equal(again(caption), ours(caption))


def test_in_again_bit_for_bit(exported):
    out, config, parameters = exported
    plain = dataclasses.replace(
        config, unet=dataclasses.replace(config.unet, lora_rank=0, lora_alpha=16.0)
    )
    assert diffusers_folder.load_config(out) == plain
    for part in PARTS:
        flat = traverse_util.flatten_dict(parameters[part])
        expected = {
            path: leaf for path, leaf in flat.items() if path[-1] not in ("lora_a", "lora_b")
        }
        read = diffusers_folder.load_part(
            out, part, traverse_util.unflatten_dict(expected), dtype=np.float32
        )
        read = traverse_util.flatten_dict(read)
        assert set(read) == set(expected)
        for path, leaf in expected.items():
            np.testing.assert_array_equal(read[path], leaf)
    tensors, _ = tensor_file.read(out / lora.WEIGHTS)
    updates = lora.read(tensors, {"unet": parameters["unet"]}, config.unet)
    for path, leaf in traverse_util.flatten_dict(
        lora.to_flax(updates, parameters["unet"], config.unet)
    ).items():
        np.testing.assert_array_equal(leaf, traverse_util.flatten_dict(parameters["unet"])[path])


def test_a_run_starts_from_it(exported):
    out, _, parameters = exported
    model = runs.load_folder(out)
    assert model.generator.config.prediction_type == "v_prediction"
    assert model.tokenizer("a red boat").shape == (2, 16)
    for part in PARTS:
        read = traverse_util.flatten_dict(model.parameters[part])
        for path, leaf in traverse_util.flatten_dict(parameters[part]).items():
            if path[-1] not in ("lora_a", "lora_b"):
                np.testing.assert_array_equal(read[path], leaf)


def fused(pipe, original):
    """The UNet's weights with the loaded updates in them."""
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return {
        name: value for name, value in oracles.tensors_of(pipe.unet).items() if name in original
    }


def test_low_rank_updates_in_diffusers(exported):
    """From our file, and from one in kohya's naming with its own strengths."""
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    out, config, parameters = exported
    unet = {"unet": parameters["unet"]}
    ours, _ = tensor_file.read(out / lora.WEIGHTS)
    rng = np.random.default_rng(3)
    kohya = {}
    for layer, (rows, columns) in {
        "output_blocks_1_1_transformer_blocks_0_attn1_to_q": (24, 24),
        "middle_block_1_transformer_blocks_0_ff_net_0_proj": (192, 24),
        "input_blocks_3_1_proj_in": (24, 24),
    }.items():
        kohya[f"lora_unet_{layer}.lora_down.weight"] = rng.normal(size=(2, columns))
        kohya[f"lora_unet_{layer}.lora_up.weight"] = rng.normal(size=(rows, 2))
        kohya[f"lora_unet_{layer}.alpha"] = np.float32(0.5 * len(layer))
    kohya = {name: np.float32(value) for name, value in kohya.items()}
    tensor_file.write(out / "kohya.safetensors", kohya)
    for name, tensors in ((lora.WEIGHTS, ours), ("kohya.safetensors", kohya)):
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
        before = oracles.tensors_of(pipe.unet)
        before = {name: value.copy() for name, value in before.items()}
        pipe.load_lora_weights(out, weight_name=name)
        theirs = fused(pipe, before)
        updates = lora.read(tensors, unet, config.unet)
        merged = pytorch_names.from_flax(lora.merge(updates, unet)["unet"])
        changed = 0
        for key, value in before.items():
            # Of a product of four terms at most, summed in another order.
            np.testing.assert_allclose(theirs[key], merged[key], rtol=1e-5, atol=1e-4)
            changed += bool(np.abs(theirs[key] - value).max() > 1e-3)
        assert changed == len(updates) == (3 if "kohya" in name else 32)


def test_the_same_image(exported):
    """Everything at once: adapter, LoRA and all parts, from a noise of zero terminal SNR."""
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    out, config, parameters = exported
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(1, 16, 16, 4)).astype(np.float32)
    reference = rng.integers(0, 256, (20, 20, 3), np.uint8)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    pipe.load_ip_adapter(
        out, subfolder="", weight_name=diffusers_folder.ADAPTER, image_encoder_folder=None
    )
    pipe.load_lora_weights(out)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = pipe(
            "a red boat",
            ip_adapter_image=Image.fromarray(reference),
            latents=oracles.nchw(noise),
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="np",
        ).images[0]
    generator, tokenizer = Generator(config), Tokenizer(out / "tokenizer", 16)
    view = jax.jit(generator.encode_reference)(parameters, reference[None, None] / np.float32(255))
    generate = make_generate(generator, steps=2, guidance=2.0, negative_token_ids=tokenizer(""))
    found = generate(
        parameters,
        tokenizer("a red boat")[None],
        np.float32([[32, 32, 0, 0, 32, 32]]),
        view,
        np.ones((1, 1), bool),
        noise,
    )
    assert np.std(expected) > 0.05
    assert np.abs(np.float32(found[0]) - np.round(255 * expected)).mean() < 0.02


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """As `exported`, of a run in bfloat16, whose vectors and adapter are float32."""
    return export_of(tmp_path_factory.mktemp("mixed"), "bfloat16")


def test_a_bfloat16_run_is_exported_in_one_type(mixed):
    """The code of the model card generates images; no trained parameter is rounded."""
    out, _, parameters = mixed
    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(parameters["unet"])}
    assert kept == {"float32", "bfloat16"}
    for path in out.rglob("*.safetensors"):
        tensors, _ = tensor_file.read(path)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}, path
    theirs = oracles.tensors_of(
        diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    )
    for name, value in pytorch_names.from_flax(parameters["unet"]).items():
        if "lora_" not in name and "_ip." not in name:
            np.testing.assert_array_equal(theirs[name], np.asarray(value, np.float32))
    card = (out / "README.md").read_text()
    assert (
        "All weights are float32, though the run computed in bfloat16; with `torch_dtype=" in card
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_the_cards_line_generates_images(mixed, dtype):
    """Of a bfloat16 run: the code as printed, and with another type."""
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    out, config, parameters = mixed
    how = {"torch_dtype": dtype} if dtype else {}
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out, **how)
    pipe.load_ip_adapter(
        out, subfolder="", weight_name=diffusers_folder.ADAPTER, image_encoder_folder=None
    )
    pipe.load_lora_weights(out)
    pipe.set_progress_bar_config(disable=True)
    reference = Image.fromarray(np.random.default_rng(4).integers(0, 256, (20, 20, 3), np.uint8))
    with torch.no_grad():
        picture = pipe(
            "a red boat",
            ip_adapter_image=reference,
            num_inference_steps=2,
            height=32,
            width=32,
            output_type="np",
        ).images[0]
    assert picture.shape == (32, 32, 3) and np.isfinite(picture).all() and picture.std() > 0.01


def spoil(path, name):
    """Changes one tensor of a file as a wrong layout would: its rows in reverse."""
    tensors, metadata = tensor_file.read(path)
    tensors = {key: np.asarray(value) for key, value in tensors.items()}
    tensors[name] = tensors[name][::-1].copy()
    tensor_file.write(path, tensors, {k: v for k, v in metadata.items() if k != "format"})


@pytest.mark.parametrize("kind", ["exported", "mixed"])
def test_check_of_a_whole_export(kind, request, tmp_path):
    """With all parts; a changed tensor of any part is detected."""
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    out, names = request.getfixturevalue(kind)[0], (*PARTS, "lora")
    found = export_check.check(out.parent, out, names, whole=True)
    assert found.reference and found.largest <= 1 and found.mean < 0.02
    assert export_check.describe(found, names).startswith(
        "checked: diffusers generates the same image with a reference, "
        f"largest difference {found.largest}/255, mean 0"
    )
    for file, tensor in (
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("ip_adapter.safetensors", "image_proj.proj_in.weight"),
        (
            "pytorch_lora_weights.safetensors",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
        ),
    )[: 3 if kind == "mixed" else 1]:
        copy = tmp_path / file.replace("/", "_")
        shutil.copytree(out, copy)
        spoil(copy / file, tensor)
        with pytest.raises(
            UserError, match=r"differs by up to \d+/255, .*/255 in the mean"
        ) as error:
            export_check.check(out.parent, copy, names, whole=True)
        largest, mean = re.search(r"up to (\d+)/255, ([\d.]+)/255", str(error.value)).groups()
        # Of the attention's queries little shows at one place.
        assert float(mean) > 0.1 and (int(largest) > 2 or "lora" in file)


def test_check_of_files_that_diffusers_cannot_open(exported, tmp_path):
    out = exported[0]
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy/vae/config.json").unlink()
    with pytest.raises(
        UserError, match=r"--check: diffusers [\d.]+ cannot open .*copy: \w+: .*config.json"
    ):
        export_check.check(out.parent, tmp_path / "copy", PARTS, whole=True)


def test_check_needs_packages(exported, monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else 1
    )
    with pytest.raises(
        UserError, match="generates with diffusers, .*; diffusers is not installed here: pip"
    ):
        export_check.check(exported[0].parent, exported[0], PARTS, whole=True)


def test_check_needs_packages_before_anything_is_written(exported, tmp_path):
    """Of the command itself, in a process that cannot import torch."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "runpy.run_module('focusdpo_jax.export', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            f"--workdir={exported[0].parent}",
            f"--output={tmp_path / 'out'}",
            "--check",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "; torch is not installed here: pip install -e" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_check_of_an_adapter_that_diffusers_cannot_use(exported, tmp_path):
    """Diffusers cannot use an adapter of another depth, and nothing else was exported."""
    run = tmp_path / "run"
    shutil.copytree(exported[0].parent / "model", run / "model")
    config = json.loads((run / "model/model.json").read_text())
    config["adapter"]["kind"], config["adapter"]["dropped"] = "resampler", "absent"
    config["adapter"]["expansion"] = 2
    (run / "model/model.json").write_text(json.dumps(config))
    (run / "model/adapter.safetensors").unlink()
    (run / "config.json").write_text(json.dumps(RUN | {"trainable": "adapter"}))
    with pytest.raises(
        UserError, match=r"--check: the subject adapter has expansion = 2 \(not 4\), so that"
    ):
        export_check.check(run, tmp_path, ("adapter",), whole=False)


@pytest.mark.parametrize(
    "trainable, files",
    [
        ("adapter", {"ip_adapter.safetensors"}),
        ("lora", {"pytorch_lora_weights.safetensors"}),
        ("full", {"unet", "ip_adapter.safetensors", "pytorch_lora_weights.safetensors"}),
    ],
)
def test_what_was_trained(exported, trainable, files, tmp_path):
    run = exported[0].parent
    (run / "config.json").write_text(json.dumps(RUN | {"trainable": trainable}))
    run_export.export_run(run, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files | {"README.md"}
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names = {
        "FOLDER": tmp_path,
        "BASE": exported[0],
        "ENCODER": exported[0] / "image_encoder",
        "CLIPVisionModelWithProjection": transformers.CLIPVisionModelWithProjection,
        "StableDiffusionXLPipeline": diffusers.StableDiffusionXLPipeline,
        "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    }
    exec(code, names)
    unet = names["pipe"].unet
    assert bool(unet.encoder_hid_proj) == (trainable != "lora")
    assert bool(getattr(unet, "peft_config", None)) == (trainable != "adapter")


def test_the_command(exported, tmp_path):
    run = exported[0].parent
    (run / "config.json").write_text(json.dumps(RUN | {"trainable": "adapter"}))
    result = subprocess.run(
        [sys.executable, "-m", "focusdpo_jax.export", f"--workdir={run}", f"--output={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"adapter written to {tmp_path}" in result.stderr
    np.testing.assert_equal(
        (tmp_path / diffusers_folder.ADAPTER).read_bytes(),
        (exported[0] / diffusers_folder.ADAPTER).read_bytes(),
    )


def test_model_card(exported):
    card = (exported[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for text in (
        "4 of 4 steps from `toybox`",
        "| loss | 0.25 |",
        "12 pairs of `data`, seed 7",
        "StableDiffusionXLPipeline.from_pretrained(FOLDER)",
        '"objective": "focus_dpo"',
        'pipe.load_ip_adapter(FOLDER, subfolder="",',
    ):
        assert text in card
    assert "not for diffusers" not in card
