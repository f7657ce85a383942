"""LoRA whose strength is stored outside its tensors: the UNet's output against diffusers and PEFT."""

import dataclasses

import jax
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
diffusers = pytest.importorskip("diffusers", reason="parity is checked against diffusers")
peft = pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

import torch  # noqa: E402
from flax import traverse_util  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402

from focusdpo_jax.checkpoints import lora, pytorch_names, tensor_file  # noqa: E402
from focusdpo_jax.models.unet import UNet  # noqa: E402
from tests.models.weights import random_tree  # noqa: E402
from tests.parity import oracles, test_unet  # noqa: E402

CONFIG, BATCH = test_unet.SMALL, test_unet.inputs(test_unet.SMALL, 8, 6)
DEEP = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ATTENTION = {"target_modules": ["to_q", "to_k", "to_out.0"]}
CASES = {
    "alpha": {"r": 4, "lora_alpha": 1},
    "larger": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    # The first that matches counts, as the end of a name or a regular expression.
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"mid_block.*to_q": 16, "to_q": 2, DEEP: 1},
    },
    "anchored": {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {f"^{DEEP}": 1, "o_k": 5, "attn2.to_[kq]": 3},
    },
    "ranks": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {r"attn\d.to_q": 9},
        "alpha_pattern": {"to_out.0": 0.5},
    },
    "convolutions": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["conv1", "proj_in", "ff.net.2"],
        "alpha_pattern": {"conv1": 3},
    },
}


@pytest.fixture(scope="module")
def base():
    """Our parameters of the peer, and the jitted UNet."""
    params = oracles.load(
        test_unet.template(CONFIG, BATCH), oracles.tensors_of(test_unet.peer(CONFIG))
    )
    return params, jax.jit(UNet(CONFIG).apply)


def move(model):
    """Random low-rank matrices, the same for every model of the same layers."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)


def their_output(model):
    with torch.no_grad():
        return test_unet.peer_output(model, BATCH)


def check(base, path, theirs, least=0.01):
    """Our output of the file on the base is theirs; the file changes what the base puts out."""
    params, run = base
    before = run({"params": params}, **BATCH)[0]
    updates = lora.load(path, {"unet": params}, CONFIG)
    merged = lora.merge(updates, {"unet": params})["unet"]
    assert oracles.relative_error(before, theirs) > least
    assert oracles.relative_error(run({"params": merged}, **BATCH)[0], theirs) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_diffusers_metadata(base, name, tmp_path):
    """As `save_lora_weights` writes it; read by diffusers itself, too."""
    model = test_unet.peer(CONFIG)
    model.add_adapter(peft.LoraConfig(**ATTENTION | CASES[name]))
    move(model)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    theirs = their_output(model)
    check(base, tmp_path, theirs)
    loaded = test_unet.peer(CONFIG)
    loaded.load_lora_adapter(tmp_path, prefix="unet", weight_name=lora.WEIGHTS)
    assert oracles.relative_error(their_output(loaded), theirs) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_peft_folder(base, name, tmp_path):
    model = peft.get_peft_model(test_unet.peer(CONFIG), peft.LoraConfig(**ATTENTION | CASES[name]))
    move(model)
    model.save_pretrained(tmp_path)
    theirs = their_output(model.base_model.model)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        check(base, path, theirs)


def test_metadata_of_the_unet_alone(base, tmp_path):
    """`unet.save_lora_adapter` names no part, neither in the header nor in the tensors."""
    model = test_unet.peer(CONFIG)
    model.add_adapter(peft.LoraConfig(**ATTENTION | CASES["patterns"]))
    move(model)
    model.save_lora_adapter(tmp_path)
    check(base, tmp_path, their_output(model))


def test_trained_from_it(base, tmp_path):
    """The updates as trainable leaves of a UNet with another alpha / rank."""
    model = test_unet.peer(CONFIG)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_k"]))
    move(model)
    model.save_lora_adapter(tmp_path)
    config = dataclasses.replace(CONFIG, lora_rank=5, lora_alpha=2.0)
    template = test_unet.template(config, BATCH)
    flat = together(
        base[0], lora.to_flax(lora.load(tmp_path, {"unet": template}, config), template, config)
    )
    out = jax.jit(UNet(config).apply)({"params": flat}, **BATCH)[0]
    assert oracles.relative_error(out, their_output(model)) < 1e-5


def together(*trees):
    """Several trees without a common leaf in one."""
    flat = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("rank, alpha", [(4, 1.0), (3, 7.0), (2, 16.0)])
def test_our_export_in_diffusers(rank, alpha, tmp_path):
    """Strengths other than 1 are in the matrices: diffusers and we read the same."""
    config = dataclasses.replace(CONFIG, lora_rank=rank, lora_alpha=alpha)
    params = random_tree(test_unet.template(config, BATCH), 5)
    lora.save(tmp_path, params, config)
    _, metadata = tensor_file.read(tmp_path / lora.WEIGHTS)
    assert set(metadata) == {"format"}
    model = test_unet.peer(CONFIG)
    tensors = {
        name: torch.from_numpy(value)
        for name, value in pytorch_names.from_flax(params).items()
        if "lora_" not in name
    }
    model.load_state_dict(tensors)
    before = their_output(model)
    model.load_lora_adapter(tmp_path, prefix="unet", weight_name=lora.WEIGHTS)
    ours = jax.jit(UNet(config).apply)({"params": params}, **BATCH)[0]
    theirs = their_output(model)
    assert oracles.relative_error(before, theirs) > 0.01
    assert oracles.relative_error(ours, theirs) < 1e-5
