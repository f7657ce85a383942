"""Adding a bias, with a gradient that suits each platform.

The gradient of a bias is the sum of its output's gradient over all rows. XLA's TPU backend takes such a
sum in the vector unit, which by its own estimate is ten times as long as the matrix unit takes for a
product with ones. That product adds up the same numbers in float32.
"""

import jax
import jax.numpy as jnp

from focusdpo_jax.models import platforms

# Rows of ones: of a single one XLA makes a sum again.
_ROWS = 8


def add_bias(x, bias):
    """x [..., C] plus bias [C], of one type."""
    if platforms.current().platform == "tpu" and x.dtype != jnp.float32:
        return _add_bias(x, bias)
    return x + bias


@jax.custom_vjp
def _add_bias(x, bias):
    return x + bias


def _gradients(_, gradient):
    rows = gradient.reshape(-1, gradient.shape[-1])
    ones = jnp.ones((_ROWS, len(rows)), rows.dtype)
    total = jnp.einsum("rn,nc->rc", ones, rows, preferred_element_type=jnp.float32)[0]
    return gradient, total.astype(gradient.dtype)


_add_bias.defvjp(lambda x, bias: (x + bias, None), _gradients)
