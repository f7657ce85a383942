import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from focusdpo_jax import compiling
from focusdpo_jax.models import attention_on_tpu, platforms
from focusdpo_jax.models.attention import attend, split_heads
from focusdpo_jax.planning import targets

RNG = np.random.default_rng(5)


def test_the_kernel_equals_plain_attention():
    query, key, value, outer = (
        jnp.asarray(RNG.normal(size=(2, n, 3, 32)), jnp.float32) for n in (128, 384, 384, 128)
    )

    def results(attend):
        out, back = jax.vjp(attend, query, key, value)
        return out, *back(outer)

    ours = results(lambda *x: attention_on_tpu.attend(*x, interpret=True))
    plain = results(jax.nn.dot_product_attention)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(
    "positions, block", [(4096, 1024), (1024, 1024), (2304, 768), (128, 128), (33 * 128, 384)]
)
def test_blocks_divide_the_positions(positions, block):
    assert attention_on_tpu._block(positions) == block


@pytest.mark.parametrize(
    "positions, heads, taken",
    [(1024, 4, True), (1000, 4, False), (256, 4, True), (128, 4, False), (1024, 1, False)],
)
def test_sizes_for_which_the_kernel_is_chosen(positions, heads, taken):
    """Whole tiles, heads of at most 128 channels, and a caller that partitions the kernel."""
    query = jax.ShapeDtypeStruct((2, positions, 256), jnp.bfloat16)
    asked = []

    def partition(attend):
        asked.append(attend)
        return jax.nn.dot_product_attention

    with platforms.target_platform(platforms.Target("tpu"), partition):
        assert (
            jax.eval_shape(lambda *x: attend(*x, heads), query, query, query).shape == query.shape
        )
    assert asked == [attention_on_tpu.attend] * taken
    with platforms.target_platform(platforms.Target("tpu")):
        jax.eval_shape(lambda *x: attend(*x, heads), query, query, query)
    assert len(asked) == taken


@pytest.mark.slow
def test_heads_are_not_padded_in_stored_values(monkeypatch):
    """With heads last, a TPU pads 64 channels to 128 in stored queries, keys and values."""
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    devices, _ = targets.devices("v5e:2x2")
    one = jax.sharding.SingleDeviceSharding(devices[0])
    batch, positions, width, layers = 4, 1024, 1280, 2

    def network(kernels, x):
        for kernel in kernels:
            heads = (split_heads(x @ matrix, width // 64) for matrix in kernel)
            x = x + attention_on_tpu.attend(*heads).reshape(x.shape)
        return jnp.square(x).sum()

    def temporaries():
        arguments = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
            for shape in ((layers, 3, width, width), (batch, positions, width))
        )
        gradient = jax.jit(jax.grad(network, argnums=1)).lower(*arguments)
        analysis = gradient.compile(compiling.network_options("tpu")).memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    ours = temporaries()
    monkeypatch.setattr(attention_on_tpu, "_LAYOUT", splash.QKVLayout.HEAD_DIM_MINOR)
    padding = 3 * 2 * batch * positions * width  # In bytes, of one layer.
    assert ours < temporaries() - layers * padding
