"""Charts as inline SVG without scripts: bars by subject, and curves of a run."""

import html
import math
from collections.abc import Callable, Mapping, Sequence

SIDES = ("base", "policy")
_WIDTH = 360  # Width of a chart in SVG units, about the width of a phone in pixels.
_ROW, _BAR, _LABEL, _VALUE = 13, 9, 118, 52


def bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, number: Callable[[float], str], title: str
) -> str:
    """Draws horizontal bars from a common zero, one group of bars per row.

    Args:
      rows: [(label, {side: value})], values finite, in the order of display.
      number: formats a value.
      title: description for screen readers.

    Returns:
      An SVG element as text.
    """
    values = [value for _, row in rows for value in row.values()]
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (_WIDTH - _LABEL - _VALUE) / max(high - low, 1e-9)
    parts, y = [], 4.0
    for label, row in rows:
        height = _ROW * len(row)
        parts.append(_text(_LABEL - 6, y + height / 2, _shortened(label, 19), "end"))
        for side, value in row.items():
            x = _LABEL + (min(value, 0.0) - low) * scale
            parts.append(
                f'<rect class="{side}" x="{x:.1f}" y="{y + 2:.1f}" '
                f'width="{abs(value) * scale:.1f}" height="{_BAR}"/>'
            )
            end = _LABEL + (max(value, 0.0) - low) * scale + 4
            parts.append(_text(end, y + _ROW / 2, number(value), "start", "small"))
            y += _ROW
        y += 6
    zero = _LABEL - low * scale
    parts.append(f'<path class="axis" d="M{zero:.1f} 2V{y:.1f}"/>')
    return _svg(_WIDTH, y + 4, parts, title)


def curve(points: Sequence[tuple[int, float]], *, title: str) -> str:
    """Draws a line through (step, value) points, labelled with its minimum and maximum.

    Args:
      points: two or more, finite, with increasing steps.
      title: heading of the chart.

    Returns:
      An SVG element as text.
    """
    steps, values = zip(*points)
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    left, right, top, bottom = 60, _WIDTH - 10, 24, 140
    across = (right - left) / max(steps[-1] - steps[0], 1)

    def place(step, value):
        return (
            f"{left + (step - steps[0]) * across:.1f} "
            f"{bottom - (value - low) / (high - low) * (bottom - top):.1f}"
        )

    line = "L".join(place(*point) for point in subsample(points, _WIDTH))
    parts = [
        _text(left, 12, title, "start", "head"),
        f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>',
        f'<path class="line" d="M{line}"/>',
        _text(left - 5, top + 4, f"{high:.3g}", "end", "small"),
        _text(left - 5, bottom - 4, f"{low:.3g}", "end", "small"),
        _text(left, bottom + 12, f"{steps[0]}", "start", "small"),
        _text(right, bottom + 12, f"step {steps[-1]}", "end", "small"),
    ]
    return _svg(_WIDTH, bottom + 22, parts, f"{title} from step {steps[0]} to {steps[-1]}")


def subsample(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Returns at most `most` evenly spaced points, and the last point."""
    stride = math.ceil(len(points) / most)
    return [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return (
        f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
        f'dominant-baseline="central">{html.escape(text)}</text>'
    )


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
