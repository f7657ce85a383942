"""Array types of the public signatures of `focus` and `diffusion`."""

import jax
import numpy as np
from jaxtyping import Float, Int

# An argument may be an array of jax, also a traced one, or of numpy; results are arrays of jax.
AnyArray = jax.Array | np.ndarray
Scalar = Float[AnyArray, ""] | np.floating | float
IntScalar = Int[AnyArray, ""] | np.integer | int
