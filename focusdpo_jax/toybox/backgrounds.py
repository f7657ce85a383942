"""Backgrounds of Toybox scenes: a muted colour with a low-contrast texture each.

Saturation and contrast are low, so that subjects stand out and the background can be recognised from
any part of it. Texture geometry scales with the image; its phase is random.
"""

import functools

import numpy as np
from jaxtyping import Float32


@functools.cache
def _grid(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel coordinates x [1, R] and y [R, 1], in units of 1/64 of the image."""
    line = np.arange(resolution, dtype=np.float32) * np.float32(64 / resolution)
    return line[None, :], line[:, None]


def _speckles(rng, x, y, spacing, share):
    """Returns random square cells of about `spacing` units; a fraction `share` of them is 1, the rest 0."""
    cells = (rng.random((int(64 / spacing) + 1,) * 2) < share).astype(np.float32)
    return cells[(y / spacing).astype(int), (x / spacing).astype(int)]


def _grass(rng, x, y):
    return 12 * _speckles(rng, x, y, 2, 0.3) - 9 * np.sin(y * 0.9 + 2 * np.sin(x * 0.8))


def _sand(rng, x, y):
    return -26 * _speckles(rng, x, y, 1.5, 0.08) + 5 * np.sin(0.35 * y + 0.12 * x)


def _snow(rng, x, y):
    return -24 * _speckles(rng, x, y, 3, 0.06) + 3 * np.sin(0.11 * x - 0.16 * y)


def _water(rng, x, y):
    del rng
    return 15 * np.sin(y * 0.75 + 1.3 * np.sin(x * 0.35))


def _brick(rng, x, y):
    del rng
    row = np.floor(y / 6)
    mortar = (y % 6 < 1.5) | ((x + 6 * (row % 2)) % 12 < 1.5)
    return 26 * mortar.astype(np.float32)


def _wood(rng, x, y):
    del rng
    grain = 7 * np.sin(1.1 * x + 1.5 * np.sin(y * 0.12))
    return grain - 30 * (x % 16 < 1.5) + 0 * y


def _tiles(rng, x, y):
    del rng
    return -26 * ((x % 11 < 1.5) | (y % 11 < 1.5)).astype(np.float32)


def _asphalt(rng, x, y):
    return 22 * _speckles(rng, x, y, 1.5, 0.12) - 14 * _speckles(rng, x, y, 1.5, 0.12)


# Background name to (mean colour, texture function).
PAINTERS = {
    "grass": ((142, 172, 122), _grass),
    "sand": ((228, 212, 168), _sand),
    "snow": ((236, 241, 247), _snow),
    "water": ((146, 180, 212), _water),
    "brick": ((178, 124, 110), _brick),
    "wood": ((150, 116, 84), _wood),
    "tiles": ((196, 216, 206), _tiles),
    "asphalt": ((116, 118, 126), _asphalt),
}


def paint(rng: np.random.Generator, name: str, resolution: int) -> Float32[np.ndarray, "3 R R"]:
    """Paints a square background, float32 [3, R, R] in [0, 255].

    Args:
      rng: source of the texture's phase and noise.
      name: a key of PAINTERS.
      resolution: side R in pixels.
    """
    color, texture = PAINTERS[name]
    x, y = _grid(resolution)
    dx, dy = rng.integers(0, 64, 2).tolist()
    shade = texture(rng, (x + dx) % 64, (y + dy) % 64)
    planes = np.array(color, np.float32)[:, None, None] + shade.astype(np.float32)
    return np.clip(planes, 0, 255)
