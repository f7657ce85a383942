"""Inpainting artefacts for the rejected images of Toybox, over the whole of a mask.

Real rejected images differ from the chosen ones wherever they were inpainted, not only where the
subject's attributes differ. Each function takes a random generator, a canvas, float32 [3, R, R] in
[0, 255], and a bool mask [R, R], and returns a new canvas that is equal outside the mask. NumPy only.
"""

import numpy as np
from jaxtyping import Float32

from focusdpo_jax.array_types import Mask

Canvas = Float32[np.ndarray, "3 _ _"]
"""An image while it is painted: float32 [3, R, R] in [0, 255]."""


def dilate(mask: Mask, pixels: int) -> Mask:
    """Dilates a bool mask [H, W] by a square of side 2 `pixels` + 1."""
    for axis in (0, 1):
        line = mask
        for shift in range(1, pixels + 1):
            low, high = [slice(None)] * 2, [slice(None)] * 2
            low[axis], high[axis] = slice(shift, None), slice(None, -shift)
            grown = line.copy()
            grown[tuple(low)] |= mask[tuple(high)]
            grown[tuple(high)] |= mask[tuple(low)]
            line = grown
        mask = line
    return mask


def blur(rng: np.random.Generator, canvas: Canvas, mask: Mask) -> Canvas:
    """Smooths with a triangular window: 1, 2, 1 on each axis at 64 pixels, wider in proportion."""
    del rng
    width = 2 * max(1, canvas.shape[1] // 64)
    window = np.convolve(np.ones(width), np.ones(width)).astype(np.float32) / width**2
    smooth = canvas
    for axis in (1, 2):
        reach = [(width - 1,) * 2 if a == axis else (0, 0) for a in range(3)]
        shifted = np.lib.stride_tricks.sliding_window_view(
            np.pad(smooth, reach, "edge"), len(window), axis
        )
        smooth = shifted @ window
    return np.where(mask, smooth, canvas)


def tint(rng: np.random.Generator, canvas: Canvas, mask: Mask) -> Canvas:
    """Scales each colour channel by a random factor of 0.9 to 1.1."""
    factors = rng.uniform(0.9, 1.1, (3, 1, 1)).astype(np.float32)
    return np.where(mask, np.clip(canvas * factors, 0, 255), canvas)


def seam(rng: np.random.Generator, canvas: Canvas, mask: Mask) -> Canvas:
    """Brightens or darkens the mask's inner border."""
    border = mask & dilate(~mask, max(1, canvas.shape[1] // 64))
    shade = np.float32(rng.choice((-30.0, 30.0)))
    return np.where(border, np.clip(canvas + shade, 0, 255), canvas)


def grain(rng: np.random.Generator, canvas: Canvas, mask: Mask) -> Canvas:
    """Adds noise with a standard deviation of 10, equal in all colour channels."""
    noise = rng.normal(0, 10, canvas.shape[1:]).astype(np.float32)
    return np.where(mask, np.clip(canvas + noise, 0, 255), canvas)


KINDS = (blur, tint, seam, grain)


def apply_random(rng: np.random.Generator, canvas: Canvas, mask: Mask) -> Canvas:
    """Applies one of KINDS, chosen at random, inside the mask."""
    return KINDS[rng.integers(len(KINDS))](rng, canvas, mask)
