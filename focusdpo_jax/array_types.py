"""Shared jaxtyping array types."""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# Arguments may be JAX arrays, also traced ones, or NumPy arrays; results are JAX arrays.
AnyArray = jax.Array | np.ndarray
Scalar = Float[AnyArray, ""] | np.floating | float
IntScalar = Int[AnyArray, ""] | np.integer | int

# Axes are anonymous (`_`): two arguments of one type may have different sizes.
RGBImage = UInt8[np.ndarray, "_ _ 3"]
"""An sRGB image, uint8 [height, width, 3]."""

Mask = Bool[np.ndarray, "_ _"]
"""A binary mask, bool [height, width]."""
