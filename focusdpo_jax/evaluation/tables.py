"""Tables of estimates as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from focusdpo_jax.evaluation import metric_names


def format_estimates(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None], int]]
) -> str:
    """Formats a table as aligned plain text.

    Args:
      columns: headings.
      rows: [(metric, [estimate (dict) or None for each column], number of trailing columns that are
        differences)].

    Returns:
      Lines joined by newlines. An arrow after a metric marks the better direction; a star after a
      difference marks an interval without zero.
    """
    lines = [["measure", *columns]]
    for name, estimates, differences in rows:
        line = [f"{metric_names.title(name)} {'↓' if metric_names.lower_is_better(name) else '↑'}"]
        for i, estimate in enumerate(estimates):
            signed = i >= len(estimates) - differences
            text = (
                "-"
                if estimate is None
                else metric_names.format_interval(name, estimate, signed=signed)
            )
            line.append(text + (" *" if signed and estimate and certain(estimate) else ""))
        lines.append(line)
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Aligns rows of cells in columns; the first row has the headings."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    ]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[1:]])


def certain(difference: Mapping[str, Any]) -> bool:
    """Returns whether an estimate's interval excludes zero."""
    return bool(difference["n"]) and (difference["low"] > 0 or difference["high"] < 0)


def format_results(results: Mapping[str, Any]) -> str:
    """Formats the metrics of an evaluation's results.json as text."""
    sides = [
        side
        for side in ("base", "policy", "difference")
        if any(side in estimates for estimates in results["metrics"].values())
    ]
    rows = [
        (name, [estimates.get(side) for side in sides], int("difference" in sides))
        for name, estimates in results["metrics"].items()
    ]
    return format_estimates(sides, rows)
