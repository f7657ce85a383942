"""Converts a manifest of images to one of pairs: inpaints every subject, keeps the best candidate.

`output_folder` describes the output. A scene's `line.json` is written last, so that an interrupted
run can be continued, and the result is the same to the byte.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np
from etils import epath

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.data import manifest, scene_manifest
from focusdpo_jax.data.images import is_converted
from focusdpo_jax.data.manifest import LineError
from focusdpo_jax.data.report import refused_lines_message
from focusdpo_jax.disruption import output_folder
from focusdpo_jax.disruption.inpainting import Inpainter
from focusdpo_jax.disruption.output_folder import MANIFEST, REPORT, SHEET
from focusdpo_jax.disruption.selection import CandidateScorer, select_candidate
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import replace_file
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.vision import regions

MODES = ("phrase", "leak")
_FORMAT = 1  # Increment when the same line would give another pair.
_SHEET_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that determine the pairs besides manifest, images, model and scorer.

    Attributes:
      mode: "phrase" inpaints each subject from its phrase only; "leak" also uses the reference of
        another subject of its scene, whose looks are transferred.
      candidates: number of candidates of each subject, one of which is selected.
      seed: base seed; a candidate's seed depends on it, on the image and on the subject's index in
        the line.
      resolution, steps, strength, guidance, sampler, batch_size: see `Inpainter`.
      max_subjects: largest number of subjects of a line.
    """

    mode: str = "phrase"
    candidates: int = 8
    seed: int = 0
    resolution: int = 64
    steps: int = 30
    strength: float = 0.75
    guidance: float = 5.0
    sampler: str = "ddim"
    batch_size: int = 8
    max_subjects: int = 3

    def inpainting(self) -> dict:
        """Returns the keyword arguments of `Inpainter`."""
        names = "resolution", "steps", "strength", "guidance", "sampler", "batch_size"
        return {name: getattr(self, name) for name in names}


def disrupt(
    path: epath.PathLike,
    output: epath.PathLike,
    settings: Settings,
    inpainter: Inpainter,
    scorer: CandidateScorer,
    *,
    identity: dict,
    count_tokens: Callable[[str], tuple[int, int]],
    draw_sheet: Callable[[epath.Path, list[dict]], None],
    hooks: scene_manifest.Hooks = scene_manifest.Hooks(),
    skip: bool = False,
) -> dict:
    """Builds the pairs of a manifest, or those that are missing.

    Args:
      path: the manifest.
      output: folder of the pairs; made if missing.
      settings: settings of the result.
      inpainter: generates candidates.
      scorer: scores candidates.
      identity: JSON values that identify model and hooks; a continued run must have the same.
      count_tokens: (number of tokens of a text, largest number that the model takes).
      draw_sheet: writes an image of some records to a path.
      hooks: supply missing masks and texts.
      skip: leave out lines that cannot be used; otherwise one of them stops the run.

    Returns:
      The report: settings, lines, scenes, subjects, refused (a list of {line, field, reason}), and
      the mean scores of the selected candidates.

    Raises:
      UserError: lines were refused, no line is left, or `output` has other content.
    """
    path, output = epath.Path(path), epath.Path(output)
    identity = json.loads(
        json.dumps({**dataclasses.asdict(settings), **identity, **scorer.name, "format": _FORMAT})
    )
    work = _Work(path, output, settings, inpainter, scorer, hooks, count_tokens)
    texts = dict(manifest.read_lines(path))
    if not texts:
        raise UserError(
            f"--manifest={path} is empty; write one JSON object per line (docs/data.md)"
        )
    try:
        output_folder.claim(output, identity)
        refused = {}
        for number, text in texts.items():
            try:
                work.read(text)
            except LineError as error:
                refused[number] = error
        _complain(refused, texts, output, identity, skip)
        progress = ItemProgress("scenes disrupted", len(texts) - len(refused))
        lines = {}
        for number, text in texts.items():
            if number in refused:
                continue
            try:
                lines[number] = work.finish(number, text)
            except LineError as error:  # From the result of a hook.
                refused[number] = error
                _complain(refused, texts, output, identity, skip)
            progress.add(1)
        return _sum_up(output, lines, refused, texts, identity, draw_sheet)
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be written ({error.strerror or error}); give a "
            "folder with room that you may write"
        ) from error


class _Work:
    """Processes single lines."""

    def __init__(
        self,
        path: epath.Path,
        output: epath.Path,
        settings: Settings,
        inpainter: Inpainter,
        scorer: CandidateScorer,
        hooks: scene_manifest.Hooks,
        count_tokens: Callable[[str], tuple[int, int]],
    ):
        self._root, self._output, self._settings = path.parent, output, settings
        self._inpainter, self._scorer, self._hooks = inpainter, scorer, hooks
        self._count_tokens = count_tokens

    def read(
        self, text: bytes
    ) -> tuple[scene_manifest.SceneLine, dict[str, bytes], scene_manifest.LoadedScene]:
        """Parses a line and reads its files; returns the line, their contents and the loaded scene.

        Raises:
          LineError: the line cannot be used.
        """
        line = scene_manifest.parse_line(
            text, max_subjects=self._settings.max_subjects, hooks=self._hooks
        )
        if self._settings.mode == "leak" and len(line.subjects) < 2:
            raise LineError(
                "subjects",
                "has 1 entry and --mode=leak needs another subject, whose looks "
                "are transferred; use --mode=phrase",
            )
        contents = {
            field: manifest.read_file(self._root, name, field)
            for field, name in line.files().items()
        }
        scene = scene_manifest.load_scene(line, contents, self._settings.resolution)
        self._check_tokens(scene)
        return line, contents, scene

    def _check_tokens(self, scene: scene_manifest.LoadedScene) -> None:
        for i, subject in enumerate(scene.subjects):
            if subject.phrase is not None:
                tokens, most = self._count_tokens(subject.phrase)
                if tokens > most:
                    raise LineError(
                        f"subjects[{i}].phrase",
                        f"has {tokens} tokens and the model reads {most}; shorten it",
                    )

    def finish(self, number: int, text: bytes) -> dict:
        """Returns the pair's line of the manifest; builds the pair unless it exists."""
        line, contents, scene = self.read(text)
        folder = self._output / "scenes" / f"{number:06d}"
        digests = [hashlib.sha256(content).hexdigest() for content in (text, *contents.values())]
        if any(map(is_converted, contents.values())):
            digests.append("colour profiles")  # Earlier versions ignored profiles.
        digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        made = output_folder.read_json(folder / "line.json")
        if made.get("digest") == digest:
            return made["line"]
        scene = scene_manifest.fill(scene, line, self._hooks, _cut)
        self._check_tokens(scene)
        rejected, records = self._rejected(scene, contents["chosen"])
        (folder / "line.json").unlink(missing_ok=True)
        made = {
            "digest": digest,
            "line": output_folder.write_pair(folder, line, contents, scene, rejected, records),
        }
        replace_file(folder / "line.json", json.dumps(made, indent=2) + "\n")
        return made["line"]

    def _rejected(self, scene: scene_manifest.Scene, chosen: bytes) -> tuple[RGBImage, list[dict]]:
        """Inpaints all subjects in turn; returns the image and the scores of each subject."""
        image, records, settings = scene.image, [], self._settings
        for i, subject in enumerate(scene.subjects):
            first = _first_seed(settings.seed, chosen, i)
            seeds = range(first, first + settings.candidates)
            donor = None
            if settings.mode == "leak":
                others = [j for j in range(len(scene.subjects)) if j != i]
                donor = others[first % len(others)]
            candidates, phrase_scores = self._inpainter.draw(
                image,
                subject.mask,
                subject.phrase,
                seeds,
                None if donor is None else scene.subjects[donor].reference,
            )
            instance, caption = self._scorer.scores(
                scene.image, candidates, subject.mask, subject.phrase, phrase_scores
            )
            best = select_candidate(instance, caption)
            scored = [
                {
                    "seed": seed,
                    "instance_similarity": round(float(a), 5),
                    "caption_similarity": round(float(b), 5),
                }
                for seed, a, b in zip(seeds, instance, caption, strict=True)
            ]
            records.append(
                {
                    "mode": settings.mode,
                    "strength": settings.strength,
                    **scored[best],
                    "candidates": scored,
                }
                | ({} if donor is None else {"donor": donor})
            )
            image = candidates[best]
        return image, records


def _first_seed(seed: int, chosen: bytes, subject: int) -> int:
    """Returns the seed of a subject's first candidate, independent of the other lines."""
    text = f"{seed} {hashlib.sha256(chosen).hexdigest()} {subject}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) % 2**30


def _cut(image: RGBImage, mask: Mask) -> tuple[RGBImage, Mask]:
    """Returns the subject alone on white, and its mask."""
    region = regions.Region.from_mask(mask)
    black = np.repeat(np.where(mask, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    return regions.crop_subject(image, region), regions.crop_subject(black, region)[..., 0] < 128


def _complain(
    refused: dict[int, LineError],
    texts: dict[int, bytes],
    output: epath.Path,
    identity: dict,
    skip: bool,
) -> None:
    """Writes the report and raises UserError if refused lines stop the run."""
    if len(refused) == len(texts) or refused and not skip:
        listed = _listed(refused)
        output_folder.write_report(output, "refused", identity, refused=listed)
        raise UserError(refused_lines_message(listed, len(texts), output / REPORT, skip))


def _listed(refused: dict[int, LineError]) -> list[dict]:
    return [
        {"line": number, "field": error.field, "reason": error.reason}
        for number, error in sorted(refused.items())
    ]


def _sum_up(
    output: epath.Path,
    lines: dict[int, dict],
    refused: dict[int, LineError],
    texts: dict[int, bytes],
    identity: dict,
    draw_sheet: Callable[[epath.Path, list[dict]], None],
) -> dict:
    """Writes manifest, contact sheet and report, and removes outdated files."""
    pairs = list(lines.values())
    replace_file(output / MANIFEST, "".join(json.dumps(pair) + "\n" for pair in pairs))
    count = min(_SHEET_ROWS, len(pairs))
    draw_sheet(
        output / SHEET,
        [output_folder.load_record(output, pairs[i * len(pairs) // count]) for i in range(count)],
    )
    records = [s["info"]["disruption"] for pair in pairs for s in pair["subjects"]]
    report = output_folder.write_report(
        output,
        "complete",
        identity,
        lines=len(texts),
        scenes=len(pairs),
        subjects=len(records),
        refused=_listed(refused),
        **{
            name: round(float(np.mean([t[name] for t in records])), 5)
            for name in ("instance_similarity", "caption_similarity")
        },
    )
    output_folder.remove_outdated(output, lines)
    return report
