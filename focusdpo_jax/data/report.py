"""The report of `prepare`: statistics of a data set, and the refused lines with reasons."""

import collections
import statistics
from collections.abc import Iterable

from etils import epath


def summarize(outcomes: list[dict], identity: dict) -> dict:
    """Returns the report of all lines.

    Args:
      outcomes: results of `line_store.process_line`, in the order of the manifest.
      identity: further entries of the report.

    Returns:
      JSON values: `identity` and
        lines, accepted: counts.
        refused: a list of {line, field, reason}.
        duplicates: a list of {line, same_as}: caption, chosen and rejected equal those of an
          earlier line; both are kept.
        subjects_per_scene: {number of subjects: lines}.
        sizes: {"height x width" of the originals: lines}.
        enlarged: number of lines whose originals are smaller than the resolution.
        changes: {conversion of an image's colours or orientation: lines}.
        prior_area, subject_area: {least, median, most}, fractions of the square image.
    """
    accepted = [(o["line"], o["facts"]) for o in outcomes if "facts" in o]
    first, duplicates = {}, []
    for line, facts in accepted:
        if first.setdefault(facts["pair"], line) != line:
            duplicates.append({"line": line, "same_as": first[facts["pair"]]})
    facts = [f for _, f in accepted]
    resolution = identity["settings"]["resolution"]
    return identity | {
        "lines": len(outcomes),
        "accepted": len(accepted),
        "refused": [
            {"line": o["line"], "field": o["refused"][0], "reason": o["refused"][1]}
            for o in outcomes
            if "refused" in o
        ],
        "duplicates": duplicates,
        "subjects_per_scene": _count(str(f["subjects"]) for f in facts),
        "sizes": _count(f"{f['size'][0]} x {f['size'][1]}" for f in facts),
        "enlarged": sum(min(f["size"]) < resolution for f in facts),
        "changes": _count(change for f in facts for change in f["changes"]),
        "prior_area": _spread([f["prior_area"] for f in facts]),
        "subject_area": _spread([area for f in facts for area in f["subject_areas"]]),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(values).items()))


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def describe(report: dict) -> str:
    """Formats the report as a few lines of text for a terminal."""

    def listed(counts, unit=""):
        return ", ".join(f"{n} with {name}{unit}" for name, n in counts.items()) or "none"

    splits = ", ".join(f"{name} {count}" for name, count in report["splits"].items())
    lines = [
        f"{report['accepted']} of {report['lines']} lines accepted ({splits})",
        f"subjects: {listed(report['subjects_per_scene'])}",
        "subject area: {least:.1%} to {most:.1%} of the image, median {median:.1%}".format(
            **report["subject_area"]
        ),
    ]
    if report["changes"]:
        lines.append(f"converted: {listed(report['changes'])}")
    if report["enlarged"]:
        lines.append(f"smaller than the resolution, and enlarged: {report['enlarged']}")
    if report["duplicates"]:
        lines.append(
            "duplicates: "
            + ", ".join(
                f"line {d['line']} repeats {d['same_as']}" for d in report["duplicates"][:5]
            )
            + (" and more" if len(report["duplicates"]) > 5 else "")
        )
    for entry in report["refused"][:10]:
        field = f" {entry['field']}" if entry["field"] else ""
        lines.append(f"refused line {entry['line']}:{field} {entry['reason']}")
    if len(report["refused"]) > 10:
        lines.append(f"and {len(report['refused']) - 10} more, see report.json")
    return "\n".join(lines)


def refused_lines_message(refused: list[dict], total: int, path: epath.Path, skip: bool) -> str:
    """Returns the error message of a command that stops because of refused lines.

    Args:
      refused: see `summarize`.
      total: number of lines.
      path: path of the report that lists all refused lines.
      skip: True if refused lines were to be left out, and no line is left.
    """
    first = refused[0]
    where = f"line {first['line']}: " + (f"{first['field']} " if first["field"] else "")
    count = "line is" if total == 1 else f"{total} lines are"
    start = f"{len(refused)} of {count} refused" + (", nothing is left" if skip else "")
    return f"{start}; {where}{first['reason']}. All reasons are in {path}" + (
        "" if skip else ". Correct the lines, or leave them out with --on-error=skip"
    )
