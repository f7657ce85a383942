"""Times self-attention on a CPU: `models.attention_by_head` and XLA's own.

    python benchmarks/attention.py

Both run alternately in one process, forward and with all gradients, at the shapes of Toybox and of
SDXL at 512 pixels with a quarter of its widths. Printed are the median milliseconds of each, their
ratio, the temporary memory of each program, and the largest relative difference of the results.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.models import platforms
from focusdpo_jax.models.attention import attend

# Batch, tokens, channels, heads.
SHAPES = [(2, 1024, 160, 10), (2, 256, 320, 20), (32, 256, 64, 4)]


def gradient(platform: str, heads: int) -> Any:
    """Returns the jitted gradient of attention, with the kernel of a platform."""

    def total(query, key, value):
        with platforms.target_platform(platforms.Target(platform)):
            return jnp.square(attend(query, key, value, heads)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))


def main(repeats: int = 11) -> None:
    """Prints one line per shape (batch, tokens, channels, heads)."""
    for batch, tokens, channels, heads in SHAPES:
        inputs = [
            jax.random.normal(key, (batch, tokens, channels))
            for key in jax.random.split(jax.random.key(0), 3)
        ]
        # The kernel for any platform but a CPU is XLA's own.
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
