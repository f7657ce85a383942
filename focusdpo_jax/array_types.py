"""Types of arrays that several packages share, written with jaxtyping."""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# An argument may be an array of jax, also a traced one, or of numpy; results are arrays of jax.
AnyArray = jax.Array | np.ndarray
Scalar = Float[AnyArray, ""] | np.floating | float
IntScalar = Int[AnyArray, ""] | np.integer | int

# Axes are anonymous (`_`): two arguments of one type may have different sizes.
RGBImage = UInt8[np.ndarray, "_ _ 3"]
"""An sRGB image, uint8 [height, width, 3]."""

Mask = Bool[np.ndarray, "_ _"]
"""A binary mask, bool [height, width]."""
