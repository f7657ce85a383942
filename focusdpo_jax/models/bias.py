"""Adding a bias, with a gradient that suits each platform.

The gradient of a bias is the sum of its output's gradient over all rows, which XLA's TPU backend takes
in the vector unit, by its own estimate ten times as long as the matrix unit takes for a product with
ones. That product adds up the same numbers in float32.
"""

import jax
import jax.numpy as jnp

from focusdpo_jax.models import platforms

# Rows of ones: a single one becomes a sum again.
_ROWS = 8


def add_bias(x, bias):
    """x [..., C] plus bias [C], of one type."""
    if platforms.current().platform == "tpu" and x.dtype != jnp.float32:
        return _add_bias(x, bias)
    return x + bias


@jax.custom_vjp
def _add_bias(x, bias):
    return x + bias


_add_bias.defvjp(lambda x, bias: (x + bias, None),
                 lambda _, gradient: (gradient, sum_of_rows(gradient).astype(gradient.dtype)))


def sum_of_rows(x):
    """The sum of x [..., C] over all axes but the last: float32 [C]."""
    x = x.reshape(-1, x.shape[-1])
    ones = jnp.ones((_ROWS, len(x)), x.dtype)
    return jnp.einsum("rn,nc->rc", ones, x, preferred_element_type=jnp.float32)[0]
