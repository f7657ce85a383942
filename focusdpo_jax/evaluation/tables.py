"""Estimates as tables of plain text."""

from focusdpo_jax.evaluation import metric_names


def format_estimates(columns, rows):
    """A table as aligned plain text.

    Args:
      columns: headings.
      rows: [(measure, [an estimate (dict) or None a column], how many of the last columns are
        differences)].

    Returns:
      Lines joined by newlines. An arrow behind a measure points to where better is; a star behind a
      difference says that its interval leaves out zero.
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


def aligned(lines):
    """Lists of cells, the first of them headings, as text in columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    ]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[1:]])


def certain(difference):
    """Whether an estimate's interval leaves out zero."""
    return bool(difference["n"]) and (difference["low"] > 0 or difference["high"] < 0)


def format_results(results):
    """The metrics of an evaluation's results.json, as text."""
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
