"""report.html: an evaluation as one self-contained page without scripts."""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.data.images import read_image
from focusdpo_jax.evaluation import metric_names
from focusdpo_jax.evaluation.scenes import BenchmarkScene
from focusdpo_jax.evaluation.tables import certain
from focusdpo_jax.files import replace_file
from focusdpo_jax.visualization import charts

_SIDE = 224  # Longest side of an image on the page, in pixels.
_SMALL = 128  # Images up to this side are embedded without resampling.
_PAGE_SIDE = 1800  # Longest side of the run's sample grids, in pixels.
# Prefixes of the run's sample grids, and their descriptions on the page.
_PAGES = {
    "step": (
        "scenes of the run: references, the pair, base and policy, and the weight that "
        "the run's objective gives to every position of the chosen image in its least noisy range "
        "of timesteps (lighter is more)."
    ),
    "focus": (
        "how that weight is computed in every range of timesteps: similarity with each "
        "reference, matched and unmatched regions, detail, and the weight."
    ),
}
_CURVES = ("loss", "implicit_accuracy", "margin", "policy_error")  # Shown first, if logged.
_MOST_CURVES = 12
_MOST_BARS = 40

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff;
  --line: #d5dae0; --base: #7489a3; --policy: #c8611a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3adb8; --paper: #16191d;
  --line: #3a4149; --base: #8fa6c2; --policy: #e88b4a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
h3 { font-size: 1rem; margin: 20px 0 6px; }
p { margin: 0 0 8px; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
th[scope=row] { white-space: normal; }
td small { display: block; color: var(--soft); font-weight: 400; }
td.free { white-space: normal; overflow-wrap: anywhere; }
.better { font-weight: 600; color: #1a7f37; }
.worse { font-weight: 600; color: #cf222e; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.grid > div { min-width: 0; }
figure { margin: 0; min-width: 0; }
.case { border: 1px solid var(--line); border-radius: 6px; padding: 10px; }
.case p { margin: 0 0 6px; }
.row { display: flex; gap: 8px; }
.row figure { flex: 1 1 0; max-width: 224px; }
.references { margin-bottom: 8px; }
.references figure { max-width: 88px; }
.row img { width: 100%; height: auto; display: block; border: 1px solid var(--line); }
.row figcaption { font-size: 12px; line-height: 1.3; }
@media (max-width: 520px) { .wide table { font-size: 13px; }
  .wide th, .wide td { padding-right: 8px; } td small { white-space: normal; } }
img.pixels { image-rendering: pixelated; }
img.page { display: block; width: 100%; min-width: 640px; height: auto; }
svg { width: 100%; max-width: 560px; height: auto; display: block; font-size: 11px; }
svg text { fill: var(--ink); }
svg .small { fill: var(--soft); font-size: 10px; }
svg .head { font-size: 12px; font-weight: 600; }
svg .axis { stroke: var(--line); fill: none; }
svg .line { stroke: var(--policy); fill: none; stroke-width: 1.5; }
.base { fill: var(--base); } .policy { fill: var(--policy); }
.key { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 0; }
.key:not(:first-child) { margin-left: 12px; }
.key.base { background: var(--base); } .key.policy { background: var(--policy); }
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of the page.

    Attributes:
      title: heading.
      about: a sentence or two about the benchmark.
      results: the values of results.json.
      scenes: scenes of the benchmark.
      scores: {side: {scene: {metric: value or list of values}}}.
      image_path: maps side and scene to the path of the image.
      workdir: folder of the run, for its curves and focus maps, or None.
    """

    title: str
    about: str
    results: dict
    scenes: list[BenchmarkScene]
    scores: dict
    image_path: Callable[[str, BenchmarkScene], epath.Path]
    workdir: epath.Path | None = None


def write(path: epath.PathLike, report: Report, *, cases: int = 6) -> None:
    """Writes the page.

    Args:
      path: path of the file.
      report: its content.
      cases: number of best and of worst scenes to show.
    """
    body = [
        f"<h1>{html.escape(report.title)}</h1>",
        f"<p>{html.escape(report.about)}</p>",
        _summary(report),
        _subjects(report),
        _cases(report, cases),
        _focus(report.workdir),
        _curves(report.workdir),
        _settings(report.results["settings"]),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    replace_file(path, page)


def _summary(report: Report) -> str:
    """Formats the table of all metrics."""
    metrics = report.results["metrics"]
    sides = [
        side
        for side in (*charts.SIDES, "difference")
        if any(side in estimates for estimates in metrics.values())
    ]
    head = "".join(
        f'<th scope="col">{html.escape(name)}</th>' for name in ("measure", *sides, "groups")
    )
    rows = []
    for name, estimates in metrics.items():
        arrow = "↓" if metric_names.lower_is_better(name) else "↑"
        cells = [f'<th scope="row">{html.escape(metric_names.title(name))} {arrow}</th>']
        for side in sides:
            estimate = estimates.get(side)
            kind, text = "", "-"
            if estimate is not None and estimate["n"]:
                text, _, ends = metric_names.format_interval(
                    name, estimate, signed=side == "difference"
                ).partition(" [")
                text = f"{html.escape(text)} <small>[{html.escape(ends)}</small>"
            if side == "difference":
                kind = _verdict(name, estimate)
            cells.append(f"<td{kind}>{text}</td>")
        counts = dict.fromkeys(str(e["n"]) for side, e in estimates.items() if side != "difference")
        cells.append(f"<td>{'/'.join(counts)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Mean and 95 % bootstrap interval over groups of scenes; an arrow points in the better "
        "direction."
    )
    if "difference" in sides:
        note += (
            " Difference: policy minus base on the same scenes; coloured if its interval "
            "excludes zero."
        )
    return (
        f'<h2>Summary</h2>\n<p class="soft">{note}</p>\n<div class="wide"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _verdict(name: str, difference: Mapping[str, Any] | None) -> str:
    if difference is None or not certain(difference):
        return ""
    better = (difference["mean"] < 0) == metric_names.lower_is_better(name)
    return ' class="better"' if better else ' class="worse"'


def _subjects(report: Report) -> str:
    """Formats bar charts by subject: the headline metric, leakage and the prompt metric."""
    names = list(report.results["metrics"])
    first = metric_names.headline(names)
    others = (first.removesuffix("_crop") + "_leakage", "leakage", "clip_t", "missing")
    chosen = [first, *(name for name in others if name in names and name != first)]
    parts = []
    for name in chosen:
        rows = {}
        for side in charts.SIDES:
            for subject, value in _by_subject(report, side, name).items():
                rows.setdefault(subject, {})[side] = value
        ordered = sorted(rows.items())
        if not ordered:
            continue
        title = f"{metric_names.title(name)}, by subject"
        chart = charts.bars(
            ordered[:_MOST_BARS],
            title=title,
            number=lambda value, name=name: metric_names.format_value(name, value),
        )
        rest = len(ordered) - _MOST_BARS
        more = f'<p class="soft">and {rest} more in scores/</p>' if rest > 0 else ""
        parts.append(f"<div><h3>{html.escape(title)}</h3>{chart}{more}</div>")
    if not parts:
        return ""
    sides = [side for side in charts.SIDES if side in report.scores]
    key = "".join(f'<span class="key {side}"></span>{side}' for side in sides)
    return f'<h2>Subjects</h2>\n<p class="soft">{key}</p>\n<div class="grid">{"".join(parts)}</div>'


def _by_subject(report: Report, side: str, name: str) -> dict[str, float]:
    """Returns {subject: mean of a metric}; a scene's single value counts for all its subjects."""
    values = {}
    for scene in report.scenes:
        score = report.scores.get(side, {}).get(scene.name, {}).get(name)
        each = score if isinstance(score, list) else [score] * len(scene.subjects)
        for subject, value in zip(scene.subjects, each):
            if value is not None:
                values.setdefault(subject.name, []).append(value)
    return {subject: float(np.mean(each)) for subject, each in values.items()}


def _cases(report: Report, count: int) -> str:
    """Formats the scenes with the largest gain and loss, or the best and worst of a single side."""
    name = metric_names.headline(list(report.results["metrics"]))
    sides = [side for side in charts.SIDES if side in report.scores]
    ranked = []
    for scene in report.scenes:
        values = [report.scores[side][scene.name].get(name) for side in sides]
        # Subjects that are not found count as 0; otherwise an image with two copies of one subject
        # could rank best.
        ranks = [
            _mean(value, 0.0 if name.endswith("_crop") and value else None) for value in values
        ]
        first, last = ranks[0], ranks[-1]
        if first is not None and last is not None:
            rank = last - first if len(sides) == 2 else first
            ranked.append((-rank if metric_names.lower_is_better(name) else rank, scene, values))
    ranked.sort(key=lambda entry: (entry[0], entry[1].name))
    both = len(sides) == 2
    if both:
        best, worst = (
            [entry for entry in ranked if entry[0] > 0],
            [entry for entry in ranked if entry[0] < 0],
        )
    else:
        best, worst = ranked[len(ranked) // 2 :], ranked[: len(ranked) // 2]
    parts = []
    for heading, entries in (
        ("Where the policy gains most" if both else "Best", best[::-1][:count]),
        ("Where the policy loses most" if both else "Worst", worst[:count]),
    ):
        if not entries:
            continue
        cards = "".join(_case(report, name, sides, scene, values) for _, scene, values in entries)
        parts.append(
            f"<h3>{heading}, by {html.escape(metric_names.title(name))}</h3>"
            f'<div class="grid">{cards}</div>'
        )
    if not parts:
        return ""
    note = "The subject reference images, and below them the generated images" + (
        ", both sides from the same noise." if both else "."
    )
    return f'<h2>Cases</h2>\n<p class="soft">{note}</p>\n' + "\n".join(parts)


def _case(report: Report, name: str, sides: list[str], scene: BenchmarkScene, values: list) -> str:
    references = [_tile(read_image(epath.Path(s.reference)), s.phrase) for s in scene.subjects]
    tiles = []
    for side, value in zip(sides, values):
        text = f"{side}: {metric_names.format_value(name, _mean(value))}"
        if name.endswith("_crop") and None in value:
            text += f", {value.count(None)} not found"
        tiles.append(_tile(read_image(report.image_path(side, scene)), text))
    return (
        f'<div class="case"><p>{html.escape(scene.prompt)} <span class="soft">'
        f"({html.escape(scene.name)})</span></p>"
        f'<div class="row references">{"".join(references)}</div>'
        f'<div class="row">{"".join(tiles)}</div></div>'
    )


def _tile(image: RGBImage, caption: str) -> str:
    caption = html.escape(caption)
    kind = ' class="pixels"' if max(image.shape[:2]) <= _SMALL else ""
    return (
        f'<figure><img{kind} src="{data_url(image, _SIDE)}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def data_url(image: RGBImage, side: int) -> str:
    """Encodes an image as a data: URL: PNG if it is small, otherwise JPEG of at most `side`.

    Args:
      image: uint8 [H, W, 3].
      side: longest side in pixels.
    """
    content, page = io.BytesIO(), Image.fromarray(image)
    if max(page.size) <= _SMALL:
        page.save(content, format="PNG", optimize=True)
        kind = "png"
    else:
        page.thumbnail((side, side), Image.Resampling.LANCZOS)
        page.save(content, format="JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode()


def _focus(workdir: epath.Path | None) -> str:
    """Formats the run's newest sample and focus map grids."""
    folder, parts = workdir / "samples" if workdir else None, []
    for kind, text in _PAGES.items():
        pages = sorted(folder.glob(f"{kind}_*.png")) if folder and folder.exists() else []
        if pages:
            step = int(pages[-1].stem.partition("_")[2])
            url = data_url(read_image(pages[-1]), _PAGE_SIDE)
            parts.append(
                f'<p>Step {step}: {text}</p>\n<div class="wide"><img class="page" '
                f'src="{url}" alt="{html.escape(text)}"></div>'
            )
    return "\n".join(["<h2>Focus maps</h2>", *parts]) if parts else ""


def _curves(workdir: epath.Path | None) -> str:
    """Formats a chart for each logged metric of the run."""
    path = workdir / "metrics.jsonl" if workdir else None
    if not path or not path.exists():
        return ""
    points = {}
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # An incomplete line: training is still running.
        for name, value in values.items():
            if "/" not in name and name != "step" and not name.endswith("_per_second"):
                points.setdefault(name, []).append((values["step"], value))
    names = [name for name in _CURVES if name in points]
    names += [name for name in sorted(points) if name not in names]
    curves = [
        charts.curve(points[name], title=name.replace("_", " "))
        for name in names
        if len(points[name]) > 1
    ][:_MOST_CURVES]
    if not curves:
        return ""
    parts = "".join(f"<div>{chart}</div>" for chart in curves)
    return f'<h2>Training</h2>\n<div class="grid">{parts}</div>'


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="free">'
        f"{html.escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in sorted(settings.items())
    )
    return f'<h2>Settings</h2>\n<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _mean(value: Any, undefined: float | None = None) -> float | None:
    """Returns the mean of a score's values, with `undefined` for None; None if there are none."""
    values = [
        undefined if v is None else v for v in (value if isinstance(value, list) else [value])
    ]
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None
