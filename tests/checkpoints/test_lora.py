import json

import numpy as np
import pytest
from flax import traverse_util

from focusdpo_jax.checkpoints import lora, tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.unet import UNetConfig

# Of two levels, as UNetConfig's `transformer_layers_per_block` and `layers_per_block` number them.
CONFIG = UNetConfig(
    block_out_channels=(8, 8),
    transformer_layers_per_block=(0, 1),
    num_heads=(1, 1),
    mid_transformer_layers=1,
    layers_per_block=1,
    norm_groups=4,
    lora_rank=4,
    lora_alpha=8.0,
)
RNG = np.random.default_rng(0)
QUERY = ("up_blocks_0", "attentions_1", "transformer_blocks_0", "attn1", "to_q")
OUT = ("mid_block", "attentions_0", "transformer_blocks_0", "attn2", "to_out_0")
CONV = ("down_blocks_0", "resnets_0", "conv1")
FC1 = ("text_model", "encoder", "layers_0", "mlp", "fc1")
SHAPES = {
    ("unet", *QUERY): (6, 8),
    ("unet", *OUT): (8, 5),
    ("unet", *CONV): (3, 3, 2, 8),
    ("text_encoder_2", *FC1): (4, 7),
}


def parameters():
    """Kernels of the layers above, and low-rank leaves of the first two."""
    flat = {
        (*path, "kernel"): RNG.normal(size=shape).astype(np.float32)
        for path, shape in SHAPES.items()
    }
    for path in (QUERY, OUT):
        width, features = SHAPES["unet", *path]
        flat["unet", *path, "lora_a"] = RNG.normal(size=(width, 4)).astype(np.float32)
        flat["unet", *path, "lora_b"] = RNG.normal(size=(4, features)).astype(np.float32)
    template = {}
    for (*path, leaf), array in flat.items():
        path = tuple(
            "transformer_blocks" if "transformer_blocks" in part else part for part in path
        )
        template[*path, leaf] = np.zeros((1 if "transformer_blocks" in path else 0, *array.shape))
    return stacking.join(flat, traverse_util.unflatten_dict(template))


def by_block(tree):
    """{path: leaf}, with separate parameters for each block."""
    return traverse_util.flatten_dict(stacking.split(tree))


PARAMETERS = parameters()
DOWN, UP = RNG.normal(size=(2, 6)).astype(np.float32), RNG.normal(size=(8, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "down, up",
    [
        (
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
        ),
        (
            "base_model.model.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "base_model.model.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
        ),
        (
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora.down.weight",
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora.up.weight",
        ),
        (
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
            "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
        ),
        (
            "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        ),
        (
            "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        ),
    ],
)
def test_every_naming(down, up):
    ((path, update),) = lora.read({down: DOWN, up: UP}, PARAMETERS, CONFIG).items()
    assert path == ("unet", *QUERY, "kernel") and update.scale == 1.0
    np.testing.assert_array_equal(update.down, DOWN)
    np.testing.assert_array_equal(update.up, UP)


def test_other_layers_and_scales():
    updates = lora.read(
        {
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": np.ones((2, 4)),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": np.ones((7, 2)),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": np.float16(1.0),
            "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": np.arange(36.0).reshape(
                2, 2, 3, 3
            ),
            "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": np.arange(16.0).reshape(
                8, 2, 1, 1
            ),
            "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.lora_down.weight": np.ones(
                (3, 8)
            ),
            "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.lora_up.weight": np.ones(
                (5, 3)
            ),
        },
        PARAMETERS,
        CONFIG,
    )
    assert {path: update.scale for path, update in updates.items()} == {
        ("text_encoder_2", *FC1, "kernel"): 0.5,
        ("unet", *CONV, "kernel"): 1.0,
        ("unet", *OUT, "kernel"): 1.0,
    }
    merged = lora.merge(updates, PARAMETERS, strength=0.5)
    flat, before = (by_block(tree) for tree in (merged, PARAMETERS))
    change = {path: flat[path] - before[path] for path in flat}
    # Strength 0.5 times alpha / rank 0.5 times the sum of two ones.
    np.testing.assert_allclose(change["text_encoder_2", *FC1, "kernel"], 0.5, atol=1e-6)
    np.testing.assert_allclose(change["unet", *OUT, "kernel"], 1.5, atol=1e-6)
    assert not change["unet", *QUERY, "kernel"].any()
    # Row 2, column 0, input 1, output 3: up[3] . down[:, 1, 2, 0].
    np.testing.assert_allclose(
        change["unet", *CONV, "kernel"][2, 0, 1, 3], 0.5 * (6 * 15 + 7 * 33), rtol=1e-6
    )


def test_trainable_leaves():
    name = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    updates = lora.read(
        {f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP}, PARAMETERS, CONFIG
    )
    flat = by_block(lora.to_flax(updates, PARAMETERS["unet"], CONFIG))
    assert set(flat) == {(*path, leaf) for path in (QUERY, OUT) for leaf in ("lora_a", "lora_b")}
    ours = CONFIG.lora_alpha / CONFIG.lora_rank * flat[*QUERY, "lora_a"] @ flat[*QUERY, "lora_b"]
    np.testing.assert_allclose(ours, (UP @ DOWN).T, rtol=1e-6)
    assert not flat[*OUT, "lora_a"].any() and not flat[*OUT, "lora_b"].any()


def test_export_and_import_are_bit_exact(tmp_path):
    lora.save(tmp_path, PARAMETERS["unet"], CONFIG)
    tensors, _ = tensor_file.read(tmp_path / "pytorch_lora_weights.safetensors")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ours = by_block(PARAMETERS["unet"])
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], ours[*OUT, "lora_a"].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], 2 * ours[*OUT, "lora_b"].T)
    assert len(tensors) == 4
    back = lora.to_flax(lora.read(tensors, PARAMETERS, CONFIG), PARAMETERS["unet"], CONFIG)
    for path, leaf in by_block(back).items():
        np.testing.assert_array_equal(leaf, ours[path])


def test_errors_name_all_misfits():
    name = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    other = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0"
    with pytest.raises(UserError) as error:
        lora.read(
            {
                f"{name}.lora_A.weight": DOWN[:, :5],
                f"{name}.lora_B.weight": UP,
                f"{other}.lora_up.weight": UP,
                "unet.conv_in.lora_A.weight": DOWN,
                f"{other}.dora_scale": UP,
            },
            PARAMETERS,
            CONFIG,
            "x.safetensors",
        )
    assert str(error.value) == (
        "x.safetensors does not fit the configured model: "
        f"1 missing: the other half of {other}.lora_up.weight; "
        f"2 unexpected: {other}.dora_scale, unet.conv_in.lora_A.weight; "
        f"1 of another shape: {name}.lora_A.weight and {name}.lora_B.weight are (2, 5) and "
        "(8, 2), not (2, 6) and (8, 2)"
    )


def test_updates_without_a_trainable_place():
    updates = {("unet", *CONV, "kernel"): lora.LowRank(np.ones((2, 2, 3, 3)), np.ones((8, 2)), 1.0)}
    with pytest.raises(
        UserError, match="updates 1 layers .* unet.down_blocks_0.resnets_0.conv1; merge it"
    ):
        lora.to_flax(updates, PARAMETERS["unet"], CONFIG)
    updates = {("unet", *QUERY, "kernel"): lora.LowRank(np.ones((5, 6)), np.ones((8, 5)), 1.0)}
    with pytest.raises(UserError, match="rank 5; set config.model.lora_rank = 5, which is 4"):
        lora.to_flax(updates, PARAMETERS["unet"], CONFIG)
    with pytest.raises(UserError, match="no low-rank updates to write"):
        lora.from_flax({"conv_in": {"kernel": np.ones(2)}}, CONFIG)


NAME = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + NAME.replace(".", "_")
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_dora": False}


def write_peft(folder, fields):
    """A folder as PEFT writes it."""
    prefix = f"base_model.model.{NAME}"
    tensor_file.write(
        folder / "adapter_model.safetensors",
        {f"{prefix}.lora_A.weight": DOWN, f"{prefix}.lora_B.weight": UP},
    )
    (folder / "adapter_config.json").write_text(
        fields if isinstance(fields, str) else json.dumps(fields)
    )


def scale_of(path):
    """The scale of a file's only update."""
    (update,) = lora.load(path, PARAMETERS, CONFIG).values()
    return update.scale


@pytest.mark.parametrize(
    "fields, scale",
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"alpha_pattern": {"to_q": 1}}, 0.5),
        ({"alpha_pattern": {"o_q": 1}}, 2.0),
        ({"alpha_pattern": {"^attn1.to_q": 1}}, 2.0),
        ({"alpha_pattern": {"up_blocks.*": 6, "to_q": 1}}, 3.0),
        ({"alpha_pattern": {"to_q.": 1, "unet.up_blocks.*": 1, f"^{NAME}": 3}}, 1.5),
        ({"r": 8, "rank_pattern": {r"attn\d.to_q": 2}}, 2.0),
        ({"alpha_pattern": None}, 2.0),
        ({"lora_alpha": 0.5}, 0.25),
        ({"init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_scale_of_a_peft_folder(fields, scale, tmp_path):
    write_peft(tmp_path, PLAIN | fields)
    assert scale_of(tmp_path) == pytest.approx(scale, rel=1e-12)
    assert scale_of(tmp_path / "adapter_model.safetensors") == pytest.approx(scale, rel=1e-12)


def test_missing_peft_fields_have_pefts_defaults(tmp_path):
    """PEFT's defaults are rank 8 and alpha 8."""
    write_peft(tmp_path, {"rank_pattern": {"to_q": 2}})
    assert scale_of(tmp_path) == 4.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save = \['conv_in'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"layer_replication": [[0, 4]]}, r"layer_replication = \[\[0, 4\]\]"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights = 'pissa_niter_4' .which changes the base",
        ),
    ],
)
def test_more_than_low_rank_updates_is_refused(fields, message, tmp_path):
    write_peft(tmp_path, PLAIN | fields)
    with pytest.raises(
        UserError,
        match=f"adapter_config.json describes more than low-rank updates: {message}"
        ".*merge_and_unload",
    ):
        lora.load(tmp_path, PARAMETERS, CONFIG)
    header = {
        "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in (PLAIN | fields).items()})
    }
    with pytest.raises(
        UserError, match=f"lora_adapter_metadata of LoRA file describes more .*: {message}"
    ):
        lora.read({}, PARAMETERS, CONFIG, metadata=header)


@pytest.mark.parametrize(
    "fields, message",
    [
        ("{", "adapter_config.json is damaged"),
        ("[]", "is damaged: it is not a JSON object"),
        (PLAIN | {"r": 4}, "has rank 4 for up_blocks.0.*to_q, whose matrices have rank 2"),
        (PLAIN | {"lora_alpha": "16"}, "lora_alpha = '16': give a finite number"),
        (PLAIN | {"r": 0}, "r = 0: give a finite number"),
        (
            PLAIN | {"alpha_pattern": {"to_(": 2}},
            r"alpha_pattern\['to_\('\] is not a regular expression",
        ),
        (PLAIN | {"alpha_pattern": [1]}, r"alpha_pattern = \[1\]: give an object"),
    ],
)
def test_invalid_peft_folders(fields, message, tmp_path):
    write_peft(tmp_path, fields)
    with pytest.raises(UserError, match=message):
        lora.load(tmp_path, PARAMETERS, CONFIG)


def test_peft_without_its_configuration(tmp_path):
    write_peft(tmp_path, PLAIN)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config.json is missing: PEFT keeps alpha there"):
        lora.load(tmp_path, PARAMETERS, CONFIG)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UserError, match="has neither pytorch_lora_weights.safetensors nor adapter_model"
    ):
        lora.load(tmp_path, PARAMETERS, CONFIG)


def kohya(alpha=None, header=None, prefix=KOHYA):
    """Tensors and header of one layer in kohya's naming."""
    tensors = {f"{prefix}.lora_down.weight": DOWN, f"{prefix}.lora_up.weight": UP}
    return tensors | ({} if alpha is None else {f"{prefix}.alpha": np.float32(alpha)}), header or {}


@pytest.mark.parametrize(
    "alpha, header, scale",
    [
        (1, {"ss_network_alpha": "1.0", "ss_network_dim": "2"}, 0.5),
        (1, {"ss_network_alpha": "16"}, 0.5),
        (None, {"ss_network_alpha": "2"}, 1.0),
        (None, {"ss_network_alpha": "None"}, 1.0),
        (4, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}, 2.0),
        (None, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}, 0.5),
    ],
)
def test_kohyas_scale(alpha, header, scale):
    tensors, metadata = kohya(alpha, header)
    (update,) = lora.read(tensors, PARAMETERS, CONFIG, metadata=metadata).values()
    assert update.scale == scale


@pytest.mark.parametrize(
    "alpha, header, message",
    [
        (
            None,
            {"ss_network_alpha": "1"},
            r"ss_network_alpha = 1 in its header, but .*to_q, of rank 2, has no",
        ),
        (None, {"ss_network_alpha": "x"}, "ss_network_alpha = 'x' is not a number"),
        (np.nan, {}, "the alpha of .*to_q is nan, which is not a finite number"),
        (
            1,
            {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})},
            "has a tensor alpha = 1, a scale of 0.5, and lora_adapter_metadata of LoRA file has 2",
        ),
        (
            None,
            {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2})},
            "has no fields for unet, so that",
        ),
        (None, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata of LoRA file is damaged"),
    ],
)
def test_ambiguous_scales_are_refused(alpha, header, message):
    tensors, metadata = kohya(alpha, header)
    with pytest.raises(UserError, match=message):
        lora.read(tensors, PARAMETERS, CONFIG, metadata=metadata)


def test_an_alpha_for_some_layers_alone_is_refused():
    other = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0"
    tensors = kohya(1)[0] | {
        f"{other}.lora_down.weight": np.ones((2, 8)),
        f"{other}.lora_up.weight": np.ones((5, 2)),
    }
    with pytest.raises(UserError, match=f"{other} has no alpha, unlike other layers of unet"):
        lora.read(tensors, PARAMETERS, CONFIG)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_fields_of_each_part(prefix):
    """Of a text encoder under its names in files and, without the outermost module, in memory."""
    name = f"text_encoder_2.{prefix}encoder.layers.0.mlp.fc1"
    fields = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "text_encoder_2.r": 4,
        "text_encoder_2.lora_alpha": 4,
        "text_encoder_2.alpha_pattern": {f"^{prefix}encoder.layers.0.mlp.fc1": 2},
    }
    updates = lora.read(
        {
            f"unet.{NAME}.lora_A.weight": DOWN,
            f"unet.{NAME}.lora_B.weight": UP,
            f"{name}.lora_A.weight": np.ones((4, 4)),
            f"{name}.lora_B.weight": np.ones((7, 4)),
        },
        PARAMETERS,
        CONFIG,
        metadata={"lora_adapter_metadata": json.dumps(fields)},
    )
    assert {path[0]: update.scale for path, update in updates.items()} == {
        "unet": 3.0,
        "text_encoder_2": 0.5,
    }
