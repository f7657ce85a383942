"""Low-rank adaptation of a dense layer (LoRA, arXiv 2106.09685)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from focusdpo_jax.models.bias import add_bias


class LoRADense(nn.Module):
    """A dense layer with an optional trainable low-rank update.

    y = x W + b + (alpha / rank) (x A) B. A [in, rank] is initialised from a normal distribution of
    variance 1 / in and B [rank, out] to zero, so that a new update changes nothing. With `rank = 0`
    the layer has the parameters of `nn.Dense` and no others.

    Attributes:
      features: output channels.
      use_bias: whether to add b.
      rank: rank of the update; 0 for none.
      alpha: strength of the update, divided by the rank.
      kernel_init: initialiser of W.
      dtype: type of the computation; parameters are created in float32.
    """

    features: int
    use_bias: bool = True
    rank: int = 0
    alpha: float = 1.0
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch features"]:
        """Maps [..., in] to [..., features]."""
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.rank:
            a = self.param("lora_a", nn.initializers.normal(width**-0.5), (width, self.rank))
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
            update = (x @ a.astype(self.dtype)) @ b.astype(self.dtype)
            y = y + (self.alpha / self.rank) * update
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = add_bias(y, bias.astype(self.dtype))
        return y
