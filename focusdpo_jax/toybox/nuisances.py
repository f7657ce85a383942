"""Traces that inpainting leaves over all of its mask, for the rejected images of Toybox.

Real rejected images differ from the chosen ones wherever they were inpainted, not only where the subject's
looks differ. Each function takes a canvas, float32 [3, R, R] in [0, 255], and a bool mask [R, R], and
returns a new canvas that is the same outside the mask. Needs numpy and nothing else.
"""

import numpy as np


def dilated(mask: np.ndarray, pixels: int) -> np.ndarray:
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


def blur(rng, canvas, mask):
    """Averages by a triangular window, 1, 2, 1 on each axis at 64 pixels and wider in proportion."""
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


def tint(rng, canvas, mask):
    """Each colour channel is up to a tenth brighter or darker."""
    factors = rng.uniform(0.9, 1.1, (3, 1, 1)).astype(np.float32)
    return np.where(mask, np.clip(canvas * factors, 0, 255), canvas)


def seam(rng, canvas, mask):
    """The mask's inner border is lighter or darker."""
    border = mask & dilated(~mask, max(1, canvas.shape[1] // 64))
    shade = np.float32(rng.choice((-30.0, 30.0)))
    return np.where(border, np.clip(canvas + shade, 0, 255), canvas)


def grain(rng, canvas, mask):
    """Noise of a deviation of 10, the same in all colour channels."""
    noise = rng.normal(0, 10, canvas.shape[1:]).astype(np.float32)
    return np.where(mask, np.clip(canvas + noise, 0, 255), canvas)


KINDS = (blur, tint, seam, grain)


def leave(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One of KINDS, drawn at random, over the mask."""
    return KINDS[rng.integers(len(KINDS))](rng, canvas, mask)
