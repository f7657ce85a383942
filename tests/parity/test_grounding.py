"""MS-Diffusion's grounding resampler against its published layout, implemented here in PyTorch."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is checked against PyTorch")

from torch.nn import functional as F  # noqa: E402

from focusdpo_jax.checkpoints import ip_adapter, pytorch_names  # noqa: E402
from focusdpo_jax.models.subject_adapter import (  # noqa: E402
    SubjectAdapterConfig,
    subject_adapter,
)
from tests.parity import oracles  # noqa: E402

CONFIG = SubjectAdapterConfig(
    kind="grounding",
    input_dim=14,
    output_dim=24,
    num_tokens=3,
    width=18,
    depth=2,
    num_heads=2,
    head_dim=64,
    phrase_dim=10,
)
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(2, 3, 5, 14)).astype(np.float32)
PHRASES = RNG.normal(size=(2, 3, 10)).astype(np.float32)
BOXES = RNG.uniform(size=(2, 3, 4)).astype(np.float32)


def published():
    """Random tensors under the names, and of the shapes, that ms_adapter.bin has."""
    hidden, inner = 10 + 2 * 4 * 8, 2 * 64
    shapes = {
        "grounding_latents": (1, 3, 18),
        "latent_proj.0": (2 * hidden, hidden),
        "latent_proj.2": (3 * 18, 2 * hidden),
        "latent_norm": (18,),
        "proj_in": (18, 14),
        "attention_norm": (18,),
        "proj_out": (24, 18),
        "norm_out": (24,),
    }
    for i in range(2):
        layer = f"layers.{i}."
        shapes |= {layer + "0.norm1": (18,), layer + "0.norm2": (18,), layer + "1.0": (18,)}
        shapes |= {
            layer + name + ".weight": shape
            for name, shape in (
                ("0.to_q", (inner, 18)),
                ("0.to_kv", (2 * inner, 18)),
                ("0.to_out", (18, inner)),
                ("1.1", (72, 18)),
                ("1.3", (18, 72)),
            )
        }
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(("latents", ".weight")):
            tensors[name] = 0.3 * RNG.normal(size=shape)
        else:
            tensors[name + ".weight"] = 0.3 * RNG.normal(size=shape)
            tensors[name + ".bias"] = 0.3 * RNG.normal(size=shape[:1])
    return {"image_proj." + name: value.astype(np.float32) for name, value in tensors.items()}


def reference(tensors, x, phrases=None, boxes=None):
    """Tokens [N, T, D] of features [N, P, input_dim], by the steps of the public code."""
    p = {
        name.removeprefix("image_proj."): torch.from_numpy(value) for name, value in tensors.items()
    }

    def dense(x, name):
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"])

    def heads(x):
        return x.reshape(len(x), -1, 2, 64).transpose(1, 2)

    latents = p["grounding_latents"].repeat(len(x), 1, 1)
    if phrases is not None:
        bands = 100 ** (torch.arange(8) / 8)
        angles = bands[None, None] * boxes.unsqueeze(-1)
        edges = torch.stack((angles.sin(), angles.cos()), -1).permute(0, 2, 3, 1)
        ground = torch.cat((phrases, edges.reshape(len(x), -1)), -1)
        latents = dense(F.gelu(dense(ground, "latent_proj.0")), "latent_proj.2")
        latents = norm(latents.view(-1, 3, 18), "latent_norm")
    x = dense(x, "proj_in")
    for i in range(2):
        layer = f"layers.{i}."
        queries = norm(latents, layer + "0.norm2")
        seen = torch.cat((norm(x, layer + "0.norm1"), queries), 1)
        key, value = dense(seen, layer + "0.to_kv").chunk(2, -1)
        out = F.scaled_dot_product_attention(
            heads(dense(queries, layer + "0.to_q")), heads(key), heads(value)
        )
        latents = latents + dense(out.transpose(1, 2).flatten(2), layer + "0.to_out")
        h = dense(norm(latents, layer + "1.0"), layer + "1.1")
        latents = latents + dense(F.gelu(h), layer + "1.3")
    return norm(dense(norm(latents, "attention_norm"), "proj_out"), "norm_out")


def test_tokens_and_the_file():
    tensors, module = published(), subject_adapter(CONFIG)
    template = jax.eval_shape(module.init, jax.random.key(0), FEATURES)["params"]
    params = oracles.load(template, ip_adapter.image_projection(tensors))
    written = ip_adapter.from_flax({}, params)
    assert set(written) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value)
    assert ip_adapter.read_config(written, ip_adapter.write_config(CONFIG)) == CONFIG
    assert ip_adapter.read_config(tensors, {}) == CONFIG
    assert "MS-Diffusion" in ip_adapter.diffusers_mismatch(CONFIG)

    apply = jax.jit(module.apply)
    x, phrases, boxes = (
        torch.from_numpy(value.reshape(6, *value.shape[2:])) for value in (FEATURES, PHRASES, BOXES)
    )
    for ours, theirs in (
        (
            apply({"params": params}, FEATURES, PHRASES, BOXES),
            reference(tensors, x, phrases, boxes),
        ),
        (apply({"params": params}, FEATURES), reference(tensors, x)),
    ):
        assert oracles.relative_error(ours, theirs.reshape(ours.shape)) < oracles.TOLERANCE


def test_the_names_of_its_own_files():
    unet = {
        "mid_block": {
            "attn2": {name: {"kernel": np.ones((2, 2))} for name in ("to_k_ip", "to_v_ip")}
        }
    }
    tensors = {
        "ms_adapter.1.to_k_ip.weight": 1,
        "ms_adapter.1.to_v_ip.weight": 2,
        "dummy_image_tokens": 3,
        "image_proj.norm_out.weight": 4,
    }
    branch, adapter = ip_adapter.to_diffusers(tensors, unet)
    assert list(branch.values()) == [1, 2] and adapter == {"norm_out.weight": 4}
    assert pytorch_names.torch_name(("mid_block", "attn2", "to_k_ip", "kernel")) == next(
        iter(branch)
    )
