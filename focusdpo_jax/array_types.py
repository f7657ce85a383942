"""Types of NumPy arrays that several packages share, written with jaxtyping.

Axes are anonymous (`_`): two arguments of one type may have different sizes.
"""

import numpy as np
from jaxtyping import Bool, UInt8

RGBImage = UInt8[np.ndarray, "_ _ 3"]
"""An sRGB image, uint8 [height, width, 3]."""

Mask = Bool[np.ndarray, "_ _"]
"""A binary mask, bool [height, width]."""
