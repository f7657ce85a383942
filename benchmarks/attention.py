"""Times self-attention on a CPU: `models.attention_by_head` beside XLA's own.

    python benchmarks/attention.py

Both run in turn in one process, forward with all gradients, at the shapes of an SDXL of a quarter of
its width at 512 pixels and of Toybox. It prints the median milliseconds of each, their ratio, the
memory that each program takes besides its arguments, and the largest relative difference.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models import platforms
from focusdpo_jax.models.attention import attend

SHAPES = [(2, 1024, 160, 10), (2, 256, 320, 20), (32, 256, 64, 4)]


def gradient(platform: str, heads: int) -> Any:
    """The compiled gradient of attention along the path of a platform."""

    def total(query, key, value):
        with platforms.target_platform(platforms.Target(platform)):
            return jnp.square(attend(query, key, value, heads)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))


def main(repeats: int = 11) -> None:
    """Prints one line a shape: batch, tokens, channels, heads."""
    for batch, tokens, channels, heads in SHAPES:
        inputs = [
            jax.random.normal(key, (batch, tokens, channels))
            for key in jax.random.split(jax.random.key(0), 3)
        ]
        # Elsewhere than on a CPU the path is XLA's.
        programs = [
            gradient(platform, heads).lower(*inputs).compile() for platform in ("tpu", "cpu")
        ]
        (_, theirs), (_, ours) = [jax.block_until_ready(p(*inputs)) for p in programs]
        error = max(
            float(jnp.abs(a - b).max() / jnp.abs(a).max())
            for a, b in zip(theirs, ours, strict=True)
        )
        times = [[], []]
        for _ in range(repeats):
            for program, record in zip(programs, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program(*inputs))
                record.append(time.perf_counter() - start)
        ratio = np.median(np.array(times[0]) / np.array(times[1]))
        xla, by_head = (1e3 * np.median(t) for t in times)
        memory = [p.memory_analysis().temp_size_in_bytes / 2**20 for p in programs]
        print(
            f"{batch:3d} x {tokens:4d} x {channels:3d}, {heads:2d} heads: xla {xla:7.1f} ms "
            f"{memory[0]:5.0f} MiB  by head {by_head:7.1f} ms {memory[1]:5.0f} MiB  ratio "
            f"{ratio:.2f}  error {error:.1e}"
        )


if __name__ == "__main__":
    main()
