"""Operations counted by hand for small programs, and compared with XLA's count for another one."""

import jax
import jax.numpy as jnp
import pytest

from focusdpo_jax.models import attention, attention_on_tpu, platforms
from focusdpo_jax.models.convolution import conv2d
from focusdpo_jax.profiling import flops


def counted(function, *shapes):
    return flops.count(
        jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    )


def test_products_and_others_are_counted_apart():
    found = counted(lambda x, y: jnp.tanh(x @ y).sum(), (3, 5), (5, 7))
    assert found == (2 * 3 * 5 * 7, 21 + 21, 0)
    assert found.total == 252


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    assert counted(loop, (2, 4), (6, 4, 4)).matmul_flops == 6 * 2 * 2 * 4 * 4
    # Forward, forward once more, both gradients.
    gradient = jax.value_and_grad(lambda *a: jnp.sum(jax.checkpoint(loop)(*a)), argnums=(0, 1))
    assert counted(gradient, (2, 4), (6, 4, 4)).matmul_flops == 6 * 2 * 2 * 4 * 4 * (1 + 1 + 2)


def test_a_kernel_counts_every_block_of_its_grid():
    """Splash attention: logits and values, in as many blocks as there are heads, queries and keys."""
    found = counted(attention_on_tpu.attend, *[(3, 2048, 5, 64)] * 3)
    assert found.matmul_flops == found.kernels == 2 * (2 * 3 * 5 * 2048 * 2048 * 64)


@pytest.mark.usefixtures("cudnn_to_trace")
def test_products_inside_cudnns_attention_are_counted():
    target = platforms.Target("gpu", 9.0)

    def attend(query, key, value):
        with platforms.target_platform(target):
            return attention.attend(query, key, value, 4).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, length, 256), jnp.bfloat16) for length in (1024, 512, 512)]
    product = 2 * 2 * 1024 * 512 * 256
    forward = flops.count(jax.jit(attend).trace(*shapes))
    assert forward.matmul_flops == forward.kernels == 2 * product
    # The logits once more, and four gradients.
    gradient = flops.count(jax.jit(jax.grad(attend, (0, 1, 2))).trace(*shapes))
    assert gradient.matmul_flops == gradient.kernels == (2 + 5) * product


def test_what_each_device_does_with_its_share_counts_on_all_of_them():
    auto = (jax.sharding.AxisType.Auto,) * 2  # As the meshes of a run; jax 0.12's default differs.
    mesh = jax.sharding.AbstractMesh((2, 3), ("data", "tensor"), auto)
    rows = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()

    def divided(x, y):
        return jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(rows, whole), out_specs=rows)(
            x, y
        )

    # The rows are divided by two; all three along "tensor" do the same.
    assert counted(divided, (4, 5), (5, 7)).matmul_flops == 3 * (2 * 4 * 5 * 7)


def test_unused_operations_count_nothing():
    @jax.jit
    def inner(x, y):
        return x @ y, y @ y

    def frozen(x, kernel):
        # The convolution's rule makes both gradients; the kernel's is thrown away.
        return jax.grad(lambda x: jnp.sum(conv2d(x, kernel) ** 2))(x)

    assert counted(lambda x, y: inner(x, y)[0], (2, 4), (4, 4)).matmul_flops == 2 * 2 * 4 * 4
    once = 2 * (2 * 8 * 8) * 32 * 9 * 32
    assert counted(frozen, (2, 8, 8, 32), (3, 3, 32, 32)).matmul_flops == 2 * once


def test_gradients_of_convolutions_count_what_the_convolution_does():
    for stride, out in (1, 8), (2, 4):
        both = jax.grad(
            lambda x, k, stride=stride: jnp.sum(conv2d(x, k, stride=stride)), argnums=(0, 1)
        )
        found = counted(both, (2, 8, 8, 32), (3, 3, 32, 16)).matmul_flops
        # A sum's gradient needs no forward pass.
        assert found == 2 * 2 * (2 * out * out * 16) * 9 * 32


def test_the_most_expensive_branch_counts_and_unknown_loops_are_refused():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(either, (4, 4)).matmul_flops == 2 * 2 * 4**3
    with pytest.raises(NotImplementedError, match="loop of unknown length"):
        counted(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), (4, 4))
