import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.errors import UserError
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig, subject_adapter
from tests.models.weights import random_params


def test_references_are_independent():
    adapter = subject_adapter(
        SubjectAdapterConfig(
            input_dim=4, output_dim=6, num_tokens=2, width=8, depth=1, num_heads=2, head_dim=3
        )
    )
    features = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    params = {"params": random_params(adapter, features)}
    apply = jax.jit(adapter.apply)
    tokens = apply(params, features)
    assert tokens.shape == (2, 3, 2, 6)
    moved = apply(params, features.at[1, 2, 0].add(1.0))
    changed = np.any(np.abs(moved - tokens) > 1e-5, axis=(2, 3))
    np.testing.assert_array_equal(changed, [[False] * 3, [False, False, True]])


def test_projection_by_hand():
    adapter = subject_adapter(
        SubjectAdapterConfig(kind="projection", input_dim=1, output_dim=2, num_tokens=2)
    )
    params = {
        "image_embeds": {"kernel": jnp.array([[1.0, -1.0, 0.0, 4.0]]), "bias": jnp.zeros(4)},
        "norm": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 1.0])},
    }
    tokens = adapter.apply({"params": params}, jnp.full((1, 1, 1), 3.0))
    np.testing.assert_allclose(tokens[0, 0], [[1, -1], [-1, 3]], atol=1e-5)


def test_the_defaults_are_ip_adapter_plus():
    adapter = subject_adapter(SubjectAdapterConfig())
    shapes = jax.eval_shape(adapter.init, jax.random.key(0), jnp.zeros((1, 1, 257, 1280)))["params"]
    assert shapes["latents"].shape == (1, 16, 1280)
    assert shapes["layers_3"]["attn"]["to_q"]["kernel"].shape == (1280, 1280)
    assert shapes["proj_out"]["kernel"].shape == (1280, 2048)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="kind = 'mlp'"):
        SubjectAdapterConfig(kind="mlp")
    with pytest.raises(UserError, match="dropped = 'zeros': choose one of .*absent"):
        SubjectAdapterConfig(dropped="zeros")
