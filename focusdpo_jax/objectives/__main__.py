"""Prints the requirements of each objective: `python -m focusdpo_jax.objectives`."""

from focusdpo_jax import objectives

_NEEDS = ("reads_rejected", "needs_reference", "uses_focus", "needs_quality")


def rows():
    """Returns a header and one row per objective, as lists of text."""
    header = ["objective", "trains", "rejected images", "reference model", "buckets", "quality"]
    body = []
    for name in objectives.names():
        objective = objectives.get(name)
        trains = "generator" if objective.trains_generator else objective.title
        needs = ["yes" if getattr(objective, need) else "-" for need in _NEEDS]
        body.append([name, trains, *needs])
    return [header, *body]


if __name__ == "__main__":
    table = rows()
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
