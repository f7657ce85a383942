import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models import layers, platforms
from focusdpo_jax.models.lora import LoRADense
from tests.models.weights import kept


def test_group_norm_by_hand():
    # Groups (1, 3 | 3, 5) and (0, 0 | 8, 0): means 3 and 2, variances 2 and 12.
    x = jnp.array([[1.0, 3.0, 0.0, 0.0], [3.0, 5.0, 8.0, 0.0]])[None]
    params = {"scale": jnp.array([1.0, 2.0, 1.0, 1.0]), "bias": jnp.array([0.0, 0.0, 0.0, 5.0])}
    out = layers.GroupNorm(2, 0.0).apply({"params": params}, x)
    first, second = 1 / np.sqrt(2), 1 / np.sqrt(12)
    np.testing.assert_allclose(
        out[0],
        [
            [-2 * first, 0.0, -2 * second, 5 - 2 * second],
            [0.0, 4 * first, 6 * second, 5 - 2 * second],
        ],
        rtol=1e-6,
        atol=1e-6,
    )


def test_group_norm_computes_statistics_in_float32():
    # bfloat16 has 8 bits: around 64 the values below differ by two units in the last place.
    x = jnp.array([64.0, 65.0, 64.0, 65.0], jnp.bfloat16).reshape(1, 2, 2)
    norm = layers.GroupNorm(1, 0.0, jnp.bfloat16)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32).ravel(), [-1, 1, -1, 1])


def test_sinusoidal_embedding_by_hand():
    out = layers.sinusoidal_embedding(jnp.array([0.0, 100.0]), 4)
    np.testing.assert_allclose(
        out, [[1, 1, 0, 0], [np.cos(100), np.cos(1), np.sin(100), np.sin(1)]], atol=1e-5
    )


def test_downsample_padding():
    x = jnp.ones((1, 4, 4, 1))
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    both = layers.Downsample().apply({"params": params}, x)[0, :, :, 0]
    np.testing.assert_array_equal(both, [[4, 6], [6, 9]])
    below = layers.Downsample(((0, 1), (0, 1))).apply({"params": params}, x)[0, :, :, 0]
    np.testing.assert_array_equal(below, [[9, 6], [6, 4]])


def test_upsample_repeats_and_crops():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    out = layers.Upsample().apply(params, x)[0, :, :, 0]
    np.testing.assert_array_equal(out, np.kron([[1, 2], [3, 4]], np.ones((2, 2))))
    cropped = layers.Upsample().apply(params, x, (3, 4))[0, :, :, 0]
    np.testing.assert_array_equal(cropped, out[:3])


def test_a_new_resnet_equals_its_shortcut():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    block = layers.ResnetBlock(8, 4, 1e-5)
    params = jax.jit(block.init)(jax.random.key(1), x)
    np.testing.assert_array_equal(block.apply(params, x), x)
    assert "conv_shortcut" not in params["params"]
    assert np.any(params["params"]["conv1"]["kernel"] != 0)


def test_feed_forward_saves_only_the_input_of_the_gate():
    """Saves nothing of the gate's output and only its input, one array or two halves."""
    x = jnp.ones((2, 5, 6))
    layer = layers.FeedForward()
    params = layer.init(jax.random.key(0), x)
    with platforms.target_platform(platforms.Target("tpu")):
        assert kept(layer.apply, params, x) == [(2, 5, 48)]
    with platforms.target_platform(platforms.Target("cpu")):
        found = kept(lambda x: layer.apply(params, x), x)
    assert [shape for shape in found if shape[0] == 2 and shape[-1] > 6] == [(2, 5, 24)] * 2


def test_feed_forward_is_the_same_on_every_platform():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    layer = layers.FeedForward()
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    flat, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(
        tree, [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(flat)]
    )
    results = []
    for platform in ("cpu", "tpu"):
        with platforms.target_platform(platforms.Target(platform)):
            assert jax.eval_shape(layer.init, jax.random.key(0), x) == shapes
            results.append(
                jax.value_and_grad(
                    lambda params, x: jnp.sin(layer.apply(params, x)).sum(), argnums=(0, 1)
                )(params, x)
            )
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_lora_by_hand():
    x = jnp.array([[1.0, 2.0]])
    layer = LoRADense(2, rank=1, alpha=3.0)
    params = {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "bias": jnp.array([0.5, 0.0]),
        "lora_a": jnp.array([[1.0], [1.0]]),
        "lora_b": jnp.array([[2.0, -1.0]]),
    }
    # x A = 3; times B = (6, -3); times alpha / rank = (18, -9).
    np.testing.assert_allclose(layer.apply({"params": params}, x), [[19.5, -7.0]])
    fresh = layer.init(jax.random.key(0), x)["params"]
    assert np.all(fresh["lora_b"] == 0) and np.any(fresh["lora_a"] != 0)
    assert set(LoRADense(2).init(jax.random.key(0), x)["params"]) == {"kernel", "bias"}


def test_bicubic_weights_by_hand():
    # Half-way between two samples the kernel is (-3, 19, 19, -3) / 32; the border is repeated.
    np.testing.assert_allclose(
        32 * layers.bicubic_weights(4, 2), [[16, 19, -3, 0], [0, -3, 19, 16]], atol=1e-5
    )
    np.testing.assert_array_equal(layers.bicubic_weights(5, 5), np.eye(5))
    for size, new_size in ((37, 32), (14, 31), (3, 7)):
        weights = layers.bicubic_weights(size, new_size)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
