import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.image_attention import slot_attention
from focusdpo_jax.models.unet import UNet, UNetConfig
from tests.models.weights import random_params

CONFIG = UNetConfig(
    block_out_channels=(8, 16),
    transformer_layers_per_block=(0, 1),
    mid_transformer_layers=1,
    layers_per_block=1,
    num_heads=(1, 2),
    cross_attention_dim=6,
    addition_time_embed_dim=4,
    pooled_dim=5,
    norm_groups=4,
    image_context=True,
)
ALL = np.ones((2, 3), bool)


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    return dict(
        sample=jax.random.normal(keys[0], (2, 4, 6, 4)),
        timesteps=jnp.array([3, 900]),
        text=jax.random.normal(keys[1], (2, 5, 6)),
        pooled=jax.random.normal(keys[2], (2, 5)),
        time_ids=jnp.full((2, 6), 64.0),
        image_tokens=jax.random.normal(keys[3], (2, 3, 2, 6)),
        image_present=ALL,
    )


@pytest.fixture(scope="module")
def params():
    return random_params(UNet(CONFIG), **inputs())


@functools.partial(jax.jit, static_argnames=("config", "capture", "dtype"))
def run(
    params, batch, scale=1.0, *, config=CONFIG, capture=("image_attention",), dtype=jnp.float32
):
    return UNet(config, dtype).apply(
        {"params": params}, **batch, image_scale=scale, capture=capture
    )


def test_without_present_slots_there_is_no_image_branch(params):
    absent = dict(inputs(), image_present=~ALL)
    prediction, captured = run(params, absent)
    np.testing.assert_array_equal(prediction, run(params, inputs(), 0.0)[0])
    assert np.any(prediction != run(params, inputs())[0])
    np.testing.assert_array_equal(captured["image_attention"], 0)


def test_an_absent_slot_has_no_effect_and_no_gradient(params):
    present = np.array([[True, False, True], [False, False, False]])
    batch = dict(inputs(), image_present=present)
    other = dict(
        batch, image_tokens=jnp.where(present[:, :, None, None], batch["image_tokens"], 1e3)
    )
    prediction, captured = run(params, batch)
    np.testing.assert_array_equal(prediction, run(params, other)[0])
    np.testing.assert_array_equal(captured["image_attention"][0, ..., 1], 0)

    gradient = jax.jit(
        jax.grad(
            lambda tokens: jnp.square(
                UNet(CONFIG).apply({"params": params}, **dict(batch, image_tokens=tokens))[0]
            ).sum()
        )
    )
    gradient = gradient(batch["image_tokens"])
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=(2, 3)), present)


def test_slots_have_no_order(params):
    batch, order = inputs(), np.array([2, 0, 1])
    prediction, captured = run(params, batch)
    swapped, moved = run(params, dict(batch, image_tokens=batch["image_tokens"][:, order]))
    np.testing.assert_allclose(prediction, swapped, rtol=1e-4, atol=1e-4)
    attention = captured["image_attention"]
    assert attention.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(attention[..., order], moved["image_attention"], atol=1e-5)
    assert np.std(attention) > 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_images_that_share_a_condition_equal_one_condition_each(params, masked):
    batch = dict(inputs(), image_present=np.array([[True, True, False], [True, False, True]]))
    if masked:
        batch |= dict(
            image_masks=jax.random.uniform(jax.random.key(1), (2, 3, 8, 12)),
            image_scales=jnp.array([[1.0, 0.5, 1.0], [0.3, 1.0, 2.0]]),
        )
    pictures = dict(
        sample=jax.random.normal(jax.random.key(2), (4, 4, 6, 4)),
        timesteps=jnp.array([3, 900, 3, 500]),
    )
    apart = {name: jnp.repeat(value, 2, axis=0) for name, value in batch.items()}
    together, apart = run(params, batch | pictures), run(params, apart | pictures)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), together, apart
    )
    assert np.abs(np.diff(together[0], axis=0)).min(axis=(1, 2, 3)).max() > 1e-4


def test_attention_of_slots_by_hand():
    # One head of width 4, two slots of two tokens; the second slot is absent in the last example.
    query = 2.0 * jnp.eye(4)[None, :2].repeat(2, 0)
    key = jnp.log(jnp.array([[2.0, 4.0], [6.0, 8.0], [1.0, 3.0], [5.0, 5.0]]))
    key = jnp.pad(key, ((0, 0), (0, 2)))[None].repeat(2, 0)
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    out = slot_attention(query, key, mask, 1, 2)
    # exp(q . k / sqrt(4)) is the table itself: position 0 has 2, 6 | 1, 5 and position 1 the rest.
    np.testing.assert_allclose(out[0], np.log([[4, 3], [6, 4]]), rtol=1e-5)
    # The map of a single slot still differs between positions.
    np.testing.assert_allclose(out[1], [[np.log(4), 0], [np.log(6), 0]], rtol=1e-5)


def test_remat_and_new_lora_change_nothing(params):
    config = dataclasses.replace(CONFIG, remat=True, lora_rank=2)
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), **inputs())["params"]
    added = traverse_util.flatten_dict(shapes).keys() - traverse_util.flatten_dict(params).keys()
    # Two matrices for each of 4 projections, in 2 attentions of 4 transformer blocks.
    assert len(added) == 2 * 4 * 2 * 4
    assert all(path[-3].startswith("attn") and path[-1].startswith("lora") for path in added)
    full, wanted = traverse_util.flatten_dict(params), traverse_util.flatten_dict(shapes)
    for path in added:
        shape = wanted[path].shape
        full[path] = np.zeros(shape) if path[-1] == "lora_b" else np.ones(shape)
    adapted = traverse_util.unflatten_dict(full)
    prediction, captured = run(adapted, inputs(), config=config)
    expected, plain = run(params, inputs())
    np.testing.assert_allclose(prediction, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(captured["image_attention"], plain["image_attention"], atol=1e-6)


def test_remat_saves_only_the_inputs_of_blocks(params):
    batch = dict(inputs(), sample=jnp.zeros((2, 32, 48, 4)))

    def kept(remat):
        """The number of values saved for the backward pass, parameters included."""
        unet = UNet(dataclasses.replace(CONFIG, remat=remat))
        _, pullback = jax.eval_shape(
            lambda p: jax.vjp(lambda p: unet.apply({"params": p}, **batch)[0], p), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept(True) < 0.3 * kept(False)


def test_half_precision_keeps_parameters_and_outputs_in_float32(params):
    prediction, captured = run(params, inputs(), dtype=jnp.bfloat16)
    assert {prediction.dtype, captured["image_attention"].dtype} == {jnp.dtype("float32")}
    error = prediction - run(params, inputs())[0]
    assert 0 < np.linalg.norm(error) / np.linalg.norm(prediction) < 0.05
    shapes = jax.eval_shape(UNet(CONFIG, jnp.bfloat16).init, jax.random.key(0), **inputs())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_the_defaults_are_sdxl():
    batch = dict(inputs(), text=jnp.zeros((2, 5, 2048)), pooled=jnp.zeros((2, 1280)))
    del batch["image_tokens"], batch["image_present"]
    shapes = jax.eval_shape(UNet(UNetConfig()).init, jax.random.key(0), **batch)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_567_463_684


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"num_heads = \(1, 2, 3\): give 2 entries"):
        dataclasses.replace(CONFIG, num_heads=(1, 2, 3))
    with pytest.raises(UserError, match="16 must be a multiple of .* num_heads = 3"):
        dataclasses.replace(CONFIG, num_heads=(1, 3))
    with pytest.raises(ValueError, match="up_blocks_7"):
        jax.eval_shape(
            functools.partial(UNet(CONFIG).init, capture=("up_blocks_7",)),
            jax.random.key(0),
            **inputs(),
        )
    with pytest.raises(ValueError, match="image_tokens"):
        jax.eval_shape(
            UNet(CONFIG).init,
            jax.random.key(0),
            **dict(inputs(), image_tokens=None, image_present=None),
        )


@pytest.mark.parametrize("remat", [False, True])
def test_layers_compute_the_same_scanned_or_not(remat):
    """Output, captured attention and all gradients, with the parameters stacked or separate."""
    scanned = dataclasses.replace(CONFIG, transformer_layers_per_block=(0, 2), remat=remat)
    apart = dataclasses.replace(scanned, scan_layers=False)
    params = random_params(UNet(scanned), **inputs())
    shapes = jax.eval_shape(UNet(apart).init, jax.random.key(0), **inputs())["params"]
    split = stacking.split(params)
    assert jax.tree.map(np.shape, split) == jax.tree.map(np.shape, shapes)
    assert "transformer_blocks_1" in split["up_blocks_0"]["attentions_0"]

    def results(params, config):
        def loss(params):
            prediction, captured = run(params, inputs(), config=config)
            return jnp.sin(prediction).sum(), (prediction, captured["image_attention"])

        return jax.grad(loss, has_aux=True)(params)

    gradient, outputs = results(split, apart)
    expected_gradient, expected = results(params, scanned)
    for ours, theirs in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    joined = stacking.join(traverse_util.flatten_dict(gradient), params)
    for ours, theirs in zip(
        jax.tree.leaves(joined), jax.tree.leaves(expected_gradient), strict=True
    ):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
