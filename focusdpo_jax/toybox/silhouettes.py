"""Outlines, patterns and parts of Toybox subjects, as signed distances.

Every function takes coordinates `x` (right) and `y` (down), float32 arrays that broadcast to one
shape, in units of the subject's radius: a body fills about [-1, 1] x [-1, 1]. It returns a signed
distance in the same units: negative inside, zero on the edge, positive outside. The distance is exact
near most of the edge and a bound at corners, which suffices for antialiasing.
"""

import math
from typing import TypedDict

import numpy as np


def length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the distance from the origin."""
    return np.sqrt(
        x * x + y * y
    )  # Several times faster than np.hypot; values cannot overflow here.


def repeat(x: np.ndarray, period: float) -> np.ndarray:
    """Folds a line into [-period / 2, period / 2), centred on the multiples of the period."""
    return x - period * np.floor(x / period + 0.5)


def circle(
    x: np.ndarray, y: np.ndarray, center_x: float, center_y: float, radius: float
) -> np.ndarray:
    """A disc."""
    return length(x - center_x, y - center_y) - radius


def rectangle(
    x: np.ndarray,
    y: np.ndarray,
    center_x: float,
    center_y: float,
    half_width: float,
    half_height: float,
) -> np.ndarray:
    """A rectangle with sides along the axes."""
    dx = np.abs(x - center_x) - half_width
    dy = np.abs(y - center_y) - half_height
    return np.maximum(dx, dy)


# --- Bodies --------------------------------------------------------------------------------------


def ball(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc."""
    return circle(x, y, 0, 0, 0.95)


def box(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square."""
    return rectangle(x, y, 0, 0, 0.82, 0.82)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A star of five points; polar folding maps every half arm onto one with a single straight edge."""
    tip, notch = 1.08, 0.52
    y = y - 0.08
    radius, angle = length(x, y), np.abs(repeat(np.arctan2(x, -y), 2 * math.pi / 5))
    # The edge runs from (tip, 0) to the notch, which lies at an angle of 36 degrees.
    normal = (notch * math.sin(math.pi / 5), tip - notch * math.cos(math.pi / 5))
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    return ((along - tip) * normal[0] + across * normal[1]) / math.hypot(*normal)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner with a half disc on each of its upper sides."""
    side = 1.12
    x, y = np.abs(x), y - 0.08
    square = np.maximum(np.abs(x + y), np.abs(x - y)) * math.sqrt(0.5) - side / 2
    lobe = circle(x, y, side * math.sqrt(0.125), -side * math.sqrt(0.125), side / 2)
    return np.minimum(square, lobe)


def tent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A triangle that stands on its base."""
    slope = math.hypot(1.7, 0.98)
    return np.maximum((np.abs(x) * 1.7 - (y + 0.95) * 0.98) / slope, y - 0.78)


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A thick ring."""
    return np.abs(length(x, y) - 0.66) - 0.31


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two broad bars at right angles."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.37)


def moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A thick crescent, open to the upper right."""
    return np.maximum(circle(x, y, 0, 0, 0.97), -circle(x, y, 0.47, -0.42, 0.66))


BODIES = {
    "ball": ball,
    "box": box,
    "star": star,
    "heart": heart,
    "tent": tent,
    "ring": ring,
    "cross": cross,
    "moon": moon,
}


# --- Patterns: negative where the second colour shows; coarse enough to survive a small VAE. ------


def stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Horizontal stripes."""
    del x
    return np.abs(repeat(y, 0.72)) - 0.15


def dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Discs on a square lattice."""
    return length(repeat(x, 0.76), repeat(y, 0.76)) - 0.26


def checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A chessboard."""
    u = 0.25 - np.abs(repeat(x, 1.0))
    v = 0.25 - np.abs(repeat(y, 1.0))
    return np.copysign(np.minimum(np.abs(u), np.abs(v)), u * v)


PATTERNS = {"plain": None, "stripes": stripes, "dots": dots, "checks": checks}


# --- Parts ---------------------------------------------------------------------------------------


class Anchors(TypedDict):
    """Position of each part on a body.

    Attributes:
      hat: its bottom.
      eyes, handle: their centre.
      legs: the y coordinate at which they start.
    """

    hat: tuple[float, float]
    eyes: tuple[float, float]
    handle: tuple[float, float]
    legs: float


ANCHORS: dict[str, Anchors] = {
    "ball": Anchors(hat=(0.0, -0.84), eyes=(0.0, -0.12), handle=(0.95, 0.0), legs=0.7),
    "box": Anchors(hat=(0.0, -0.78), eyes=(0.0, -0.12), handle=(0.86, 0.0), legs=0.7),
    "star": Anchors(hat=(0.0, -0.66), eyes=(0.0, 0.0), handle=(0.62, 0.12), legs=0.4),
    "heart": Anchors(hat=(0.0, -0.56), eyes=(0.0, -0.12), handle=(0.86, 0.0), legs=0.3),
    "tent": Anchors(hat=(0.0, -0.52), eyes=(0.0, 0.30), handle=(0.60, 0.20), legs=0.7),
    "ring": Anchors(hat=(0.0, -0.84), eyes=(0.0, -0.55), handle=(0.95, 0.0), legs=0.7),
    "cross": Anchors(hat=(0.0, -0.84), eyes=(0.0, -0.10), handle=(0.62, 0.50), legs=0.7),
    "moon": Anchors(hat=(-0.30, -0.78), eyes=(-0.28, 0.22), handle=(-0.90, 0.10), legs=0.6),
}


def hat(x: np.ndarray, y: np.ndarray, anchor: tuple[float, float]) -> np.ndarray:
    """A top hat: brim and crown."""
    x, y = x - anchor[0], y - anchor[1]
    return np.minimum(rectangle(x, y, 0, 0, 0.62, 0.10), rectangle(x, y, 0, -0.28, 0.36, 0.28))


def handle(x: np.ndarray, y: np.ndarray, anchor: tuple[float, float]) -> np.ndarray:
    """A mug's handle; its inner half hides behind the body."""
    return np.abs(circle(x, y, anchor[0], anchor[1], 0.34)) - 0.12


def legs(x: np.ndarray, y: np.ndarray, anchor: float) -> np.ndarray:
    """Two legs with feet pointing outwards."""
    x = np.abs(x)
    leg = rectangle(x, y, 0.34, 0.5 * (anchor + 1.3), 0.12, 0.5 * (1.3 - anchor))
    return np.minimum(leg, rectangle(x, y, 0.44, 1.2, 0.24, 0.10))


def eyes(x: np.ndarray, y: np.ndarray, anchor: tuple[float, float]) -> np.ndarray:
    """The whites of two eyes, side by side."""
    return circle(np.abs(x - anchor[0]), y - anchor[1], 0.29, 0, 0.27)


def pupils(x: np.ndarray, y: np.ndarray, anchor: tuple[float, float]) -> np.ndarray:
    """The pupils of the eyes."""
    return circle(np.abs(x - anchor[0]), y - anchor[1], 0.25, 0.05, 0.14)


PARTS = ("eyes", "hat", "handle", "legs")
