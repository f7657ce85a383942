import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focusdpo_jax.models import attention, attention_by_head, platforms
from focusdpo_jax.models.attention import attend
from tests.models.weights import kept

TPU = platforms.Target("tpu")
AMPERE, HOPPER = (platforms.Target("gpu", capability) for capability in (8.0, 9.0))


@pytest.mark.parametrize(
    "target, queries, keys, head_dim, options, kernel",
    [
        # SDXL's self-attention at 1024 px.
        (platforms.Target("cpu"), 4096, 4096, 64, {}, "by_head"),
        (TPU, 4096, 4096, 64, {"partitioned": True}, "splash"),
        (TPU, 4096, 4096, 64, {}, "xla"),  # No division among devices is given.
        (AMPERE, 4096, 4096, 64, {}, "cudnn"),
        (HOPPER, 4096, 4096, 64, {}, "cudnn"),
        (platforms.Target("gpu", 7.5), 4096, 4096, 64, {}, "xla"),  # Turing.
        (platforms.Target("gpu"), 4096, 4096, 64, {}, "xla"),  # AMD.
        (HOPPER, 4096, 4096, 64, {"dtype": jnp.float32}, "xla"),
        # IP-Adapter-Plus's resampler: 257 features and 16 queries.
        (HOPPER, 16, 273, 64, {}, "cudnn-forward"),
        (TPU, 16, 273, 64, {"partitioned": True}, "xla"),
        # CLIP ViT-H and bigG.
        (AMPERE, 257, 257, 80, {}, "cudnn-forward"),
        (AMPERE, 257, 257, 104, {}, "cudnn-forward"),
        # Text and image tokens.
        (HOPPER, 4096, 77, 64, {}, "xla"),
        (HOPPER, 4096, 4096, 64, {"masked": True}, "xla"),
        (platforms.Target("cpu"), 77, 77, 64, {"causal": True}, "xla"),
        # The autoencoder's one head.
        (HOPPER, 16384, 16384, 512, {}, "xla"),
        (TPU, 16384, 16384, 512, {"partitioned": True}, "xla"),
        (HOPPER, 4096, 4096, 60, {}, "xla"),
        # 24 x 24 positions at 768 px are not a multiple of a tile of 128.
        (TPU, 576, 576, 64, {"partitioned": True}, "xla"),
    ],
)
def test_a_kernel_is_chosen_from_the_target(target, queries, keys, head_dim, options, kernel):
    options = {"dtype": jnp.bfloat16, **options}
    assert (
        attention.choose_kernel(target, options.pop("dtype"), queries, keys, head_dim, **options)
        == kernel
    )


@pytest.fixture
def cudnn(cudnn_to_trace):
    """cuDNN attention can be lowered, on a machine without a GPU; returns programs as text."""
    del cudnn_to_trace

    def program(function, *arguments, target=HOPPER):
        def traced(*arrays):
            with platforms.target_platform(target):
                return function(*arrays)

        return jax.jit(traced).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return program


def test_programs_for_gpus_call_cudnn(cudnn):
    long, short = (jax.ShapeDtypeStruct((2, tokens, 128), jnp.bfloat16) for tokens in (1024, 77))

    def gradient(query, key, value):
        return jax.grad(lambda *x: attend(*x, 2).astype(jnp.float32).sum())(query, key, value)

    text = cudnn(gradient, long, long, long)
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "cudnn$fmha" not in cudnn(gradient, long, short, short)
    assert "cudnn$fmha" not in cudnn(
        gradient, long, long, long, target=platforms.Target("gpu", 7.5)
    )


@pytest.mark.parametrize("queries, keys", [(16, 273), (257, 257), (1025, 1025), (1024, 273)])
def test_odd_lengths_can_be_differentiated_for_gpus(cudnn, queries, keys):
    """cuDNN's backward pass rejects them, which made every run with a resampler fail."""
    query, key = (jax.ShapeDtypeStruct((2, n, 128), jnp.bfloat16) for n in (queries, keys))

    def forward(query, key, value):
        return attend(query, key, value, 2)

    def gradient(query, key, value):
        return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            query, key, value
        )

    assert "__cudnn$fmhaSoftmax" in cudnn(forward, query, key, key)
    assert "cudnn$fmha" not in cudnn(gradient, query, key, key)


def test_odd_lengths_have_the_gradients_of_plain_attention(monkeypatch):
    query, key, value = (
        jax.random.normal(jax.random.key(i), (2, n, 12)) for i, n in enumerate((3, 257, 257))
    )
    monkeypatch.setattr(attention, "_cudnn", attention._xla)
    monkeypatch.setattr(attention, "choose_kernel", lambda *a, **k: "cudnn-forward")
    out, back = jax.vjp(lambda *x: attend(*x, 2), query, key, value)
    monkeypatch.setattr(attention, "choose_kernel", lambda *a, **k: "xla")
    plain, plain_back = jax.vjp(lambda *x: attend(*x, 2), query, key, value)
    np.testing.assert_array_equal(out, plain)
    jax.tree.map(np.testing.assert_array_equal, back(jnp.sin(out)), plain_back(jnp.sin(out)))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_long_queries_run_in_chunks(platform, monkeypatch):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 24, 12))
    mask = jnp.arange(24) < jnp.array([[20], [24]])

    def results():
        def total(*x):
            out = attend(*x, 2, key_mask=mask)
            return jnp.sin(out).sum(), out

        with platforms.target_platform(platforms.Target(platform)):
            program = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
            return program(query, key, value), program.lower(query, key, value).as_text()

    whole, text = results()
    assert "x24x24xf32" in text  # All logits at once.
    monkeypatch.setattr(attention, "MOST_LOGITS", (1 if platform == "cpu" else 2) * 24 * 10)
    pieces, text = results()
    assert "x24x24xf32" not in text and "x8x24xf32" in text
    for ours, expected in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_autoencoder_never_holds_all_logits():
    """At 1024 px they are 16384 x 16384."""
    x = jax.ShapeDtypeStruct((1, 16384, 512), jnp.bfloat16)
    for target in (platforms.Target("cpu"), TPU, HOPPER):
        with platforms.target_platform(target):
            text = str(jax.make_jaxpr(lambda *x: attend(*x, 1))(x, x, x))
        assert "16384,16384]" not in text and "2048,16384]" in text


def test_attention_over_no_key_is_zero_and_has_zero_gradients():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 4, 6))
    mask = jnp.array([[True, False, True, False], [False] * 4])

    def total(query, key, value):
        out = attend(query, key, value, 2, key_mask=mask)
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    assert np.all(out[1] == 0) and np.all(np.abs(out[0]).sum(-1) > 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient)) and np.all(gradient[1] == 0)
        assert np.any(gradient[0] != 0)
    # A masked key has no effect.
    kept = attend(query[:1], key[:1, ::2], value[:1, ::2], 2)
    np.testing.assert_allclose(out[:1], kept, atol=1e-6)


def test_causal_attention_ignores_later_keys():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 3, 4))
    out = attend(query, key, value, 1, causal=True)
    np.testing.assert_allclose(out[0, 0], value[0, 0], atol=1e-6)


def test_attention_to_few_keys_saves_no_logits():
    query, key = jnp.ones((2, 7, 12)), jnp.ones((2, 9, 12))
    mask = jnp.ones((2, 9), bool).at[0, 3].set(False)
    with platforms.target_platform(TPU):
        found = kept(lambda *x: attend(*x, 3, key_mask=mask), query, key, key)
    assert not [shape for shape in found if shape[-2:] == (7, 9)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("few_keys", [8, 9])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_attention_by_head_equals_plain_attention(
    dtype, tolerance, few_keys, at_once, masked, monkeypatch
):
    """Forward and all three gradients, one of three heads after the other and all at once, with the
    output kept and not."""
    rng = np.random.default_rng(4)
    query, key, value, outer = (
        jnp.asarray(rng.normal(size=(2, n, 12)), dtype) for n in (5, 9, 9, 5)
    )
    mask = jnp.asarray(rng.random((2, 9)) < 0.6) if masked else None
    monkeypatch.setattr(attention_by_head, "_LOGITS", at_once * 2 * 5 * 9)
    monkeypatch.setattr(attention_by_head, "_FEW_KEYS", few_keys)

    def masked_attend(*arrays):
        return attend(*arrays, 3, key_mask=mask)

    def results(platform):
        with platforms.target_platform(platforms.Target(platform)):
            out, back = jax.vjp(masked_attend, query, key, value)
            return [np.asarray(x, np.float32) for x in (out, *back(outer))]

    def loops(platform):
        with platforms.target_platform(platforms.Target(platform)):
            return "while" in str(
                jax.jit(lambda *x: masked_attend(*x)).lower(query, key, value).as_text()
            )

    assert loops("cpu") == (at_once == 1) and not loops("tpu")
    for ours, plain in zip(results("cpu"), results("tpu"), strict=True):
        assert np.linalg.norm(ours - plain) < tolerance * np.linalg.norm(plain)
