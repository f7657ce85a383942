"""Subject adapters and the UNet's image branch against diffusers' IP-Adapter."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("diffusers", reason="parity is checked against diffusers")

import torch  # noqa: E402
from diffusers.image_processor import IPAdapterMaskProcessor  # noqa: E402
from diffusers.models import embeddings  # noqa: E402

from focusdpo_jax.checkpoints import ip_adapter, pytorch_names  # noqa: E402
from focusdpo_jax.models import image_attention  # noqa: E402
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig, subject_adapter  # noqa: E402
from focusdpo_jax.models.unet import UNet  # noqa: E402
from tests.parity import oracles, test_unet  # noqa: E402

BATCH, SLOTS = 2, 3
FEATURES = np.random.default_rng(1).normal(size=(BATCH, SLOTS, 5, 14)).astype(np.float32)
# Depth 4 and 64 channels a head are fixed in diffusers' loader of IP-Adapter files.
RESAMPLER = SubjectAdapterConfig(
    input_dim=14, output_dim=24, num_tokens=3, width=18, depth=4, num_heads=2, head_dim=64
)


def their_resampler():
    return oracles.randomised(
        embeddings.IPAdapterPlusImageProjection,
        embed_dims=14,
        output_dims=24,
        hidden_dims=18,
        depth=4,
        heads=2,
        num_queries=3,
    )


def parameters(config, inputs, tensors):
    template = jax.eval_shape(subject_adapter(config).init, jax.random.key(0), inputs)["params"]
    return oracles.load(template, tensors)


def test_resampler():
    model = their_resampler()
    params = parameters(RESAMPLER, FEATURES, oracles.tensors_of(model))
    ours = jax.jit(subject_adapter(RESAMPLER).apply)({"params": params}, FEATURES)
    theirs = model(torch.from_numpy(FEATURES.reshape(-1, 5, 14)))
    assert oracles.relative_error(ours, theirs.reshape(BATCH, SLOTS, 3, 24)) < oracles.TOLERANCE


def test_projection():
    config = SubjectAdapterConfig(kind="projection", input_dim=14, output_dim=24, num_tokens=4)
    model = oracles.randomised(embeddings.ImageProjection, 14, 24, 4)
    pooled = FEATURES[:, :, 0]
    params = parameters(config, pooled, oracles.tensors_of(model))
    ours = jax.jit(subject_adapter(config).apply)({"params": params}, pooled)
    theirs = model(torch.from_numpy(pooled.reshape(-1, 14)))
    assert oracles.relative_error(ours, theirs.reshape(BATCH, SLOTS, 4, 24)) < oracles.TOLERANCE


@pytest.fixture(scope="module")
def adapted():
    """Our UNet and resampler with random weights, and diffusers' with our IP-Adapter file."""
    config = dataclasses.replace(
        test_unet.CONFIG,
        image_context=True,
        transformer_layers_per_block=(0, 1, 1),
        mid_transformer_layers=1,
    )
    batch = test_unet.inputs(config, 8, 12)
    model = test_unet.peer(config)
    adapter = parameters(RESAMPLER, FEATURES, oracles.tensors_of(their_resampler()))
    tokens = jax.jit(subject_adapter(RESAMPLER).apply)({"params": adapter}, FEATURES)
    batch.update(image_tokens=tokens, image_present=np.ones((BATCH, SLOTS), bool))
    template = test_unet.template(config, batch)
    rng = np.random.default_rng(5)
    tensors = oracles.tensors_of(model)
    expected = pytorch_names.from_flax(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), template)
    )
    for name in sorted(set(expected) - set(tensors)):
        tensors[name] = 0.3 * rng.normal(size=expected[name].shape).astype(np.float32)
    params = oracles.load(template, tensors)

    file = ip_adapter.from_flax(params, adapter)
    unet, projection = ip_adapter.to_diffusers(file, template)
    assert len(unet) == 2 * (2 + 2 + 1 + 3 + 3)
    for name, value in unet.items():
        np.testing.assert_array_equal(value, tensors[name])
    jax.tree.map(np.testing.assert_array_equal, adapter, pytorch_names.to_flax(projection, adapter))
    parts = {
        part: {
            name.removeprefix(f"{part}."): torch.from_numpy(value)
            for name, value in file.items()
            if name.startswith(f"{part}.")
        }
        for part in ("image_proj", "ip_adapter")
    }
    model._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    model.requires_grad_(False)
    return config, params, batch, model


NAMES = ("down_blocks_0", "mid_block", "up_blocks_0", "image_attention")


@functools.partial(jax.jit, static_argnums=0)
def ours(config, params, batch, scale):
    """One executable for all tests below."""
    return UNet(config).apply({"params": params}, **batch, image_scale=scale, capture=NAMES)


def theirs(model, batch, features, scale, **how):
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    return test_unet.peer_output(model, batch, how, image_embeds=[torch.from_numpy(features)])


def test_unet_with_an_adapter_file(adapted):
    config, params, batch, model = adapted
    prediction, _ = ours(config, params, batch, 0.6)
    expected = theirs(model, batch, FEATURES, 0.6)
    assert oracles.relative_error(prediction, expected) < oracles.TOLERANCE


def test_an_absent_slot_equals_no_slot(adapted):
    config, params, batch, model = adapted
    batch = dict(batch, image_present=np.array([[True, True, False]] * BATCH))
    prediction, _ = ours(config, params, batch, 1.0)
    expected = theirs(model, batch, FEATURES[:, :2], 1.0)
    assert oracles.relative_error(prediction, expected) < oracles.TOLERANCE


def test_masks_and_scales_of_each_reference(adapted):
    """Masks of the image's aspect, which neither level's grid divides evenly."""
    config, params, batch, model = adapted
    masks = np.random.default_rng(6).uniform(size=(1, SLOTS, 20, 30)).astype(np.float32)
    masks[0, 1, :, 12:] = 0
    scales = [0.5, 1.5, 0.8]
    batch = dict(
        batch, image_masks=np.repeat(masks, BATCH, 0), image_scales=np.float32([scales] * BATCH)
    )
    prediction, _ = ours(config, params, batch, 1.0)
    expected = theirs(
        model,
        batch,
        FEATURES,
        scales,
        cross_attention_kwargs={"ip_adapter_masks": [torch.from_numpy(masks)]},
    )
    assert oracles.relative_error(prediction, expected) < oracles.TOLERANCE

    batch["image_present"] = np.array([[True, True, False]] * BATCH)
    prediction, _ = ours(config, params, batch, 1.0)
    expected = theirs(
        model,
        batch,
        FEATURES[:, :2],
        scales[:2],
        cross_attention_kwargs={"ip_adapter_masks": [torch.from_numpy(masks[:, :2])]},
    )
    assert oracles.relative_error(prediction, expected) < oracles.TOLERANCE


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (3, 5), (7, 4)])
def test_masks_on_a_grid(grid):
    """Of the same aspect, as near as whole positions come."""
    masks = np.random.default_rng(7).uniform(size=(1, 2, 10 * grid[0], 10 * grid[1]))
    found = image_attention.resize_masks(masks.astype(np.float32), grid)
    for slot in range(2):
        expected = IPAdapterMaskProcessor.downsample(
            torch.from_numpy(masks[:, slot]), 1, grid[0] * grid[1], 1
        )
        np.testing.assert_allclose(found[0, slot], expected[0, :, 0], atol=1e-6)


def test_captures(adapted):
    config, params, batch, model = adapted
    seen, pairs, handles = {}, [], []

    def keep(name, module):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    keep("down_blocks_0", model.down_blocks[0].resnets[1])
    keep("mid_block", model.mid_block)
    keep("up_blocks_0", model.up_blocks[0].attentions[2])
    for block in (model.down_blocks[1], model.up_blocks[1]):
        for transformer in block.attentions:
            attention = transformer.transformer_blocks[0].attn2
            handles.append(
                attention.to_q.register_forward_hook(
                    lambda module, inputs, output: pairs.append([output])
                )
            )
            handles.append(
                attention.processor.to_k_ip[0].register_forward_hook(
                    lambda module, inputs, output: pairs[-1].append(output)
                )
            )
    theirs(model, batch, FEATURES, 1.0)
    for handle in handles:
        handle.remove()

    _, captured = ours(config, params, batch, 1.0)
    assert set(captured) == set(NAMES)
    for name, features in seen.items():
        assert oracles.relative_error(captured[name], oracles.nhwc(features)) < oracles.TOLERANCE

    assert len(pairs) == 5
    masses = []
    for query, key in pairs:
        query, key = (x.reshape(BATCH, -1, 2, 16) for x in (query, key))
        weights = torch.exp(torch.einsum("bnhd,bkhd->bhnk", query, key) / 4)
        weights = weights.reshape(BATCH, 2, 4, 6, SLOTS, 3).mean(-1)
        masses.append(torch.log(weights).mean(1))
    assert oracles.relative_error(captured["image_attention"], sum(masses) / 5) < oracles.TOLERANCE
