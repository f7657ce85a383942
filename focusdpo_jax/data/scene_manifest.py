"""A line of the manifest that `disrupt` reads: a good image and its subjects (docs/data.md).

It is a line of `manifest` without what is to be made, the rejected image. What else it may lack
is made up for: masks by a segmenter and texts by a captioner, where there are such; a reference by
what the mask cuts out.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from focusdpo_jax.data import geometry, line_record, manifest
from focusdpo_jax.data.manifest import LineError

_FIELDS = ("caption", "chosen", "subjects", "group", "info")
_SUBJECT_FIELDS = ("reference", "reference_mask", "phrase", "mask", "box", "info")
_WORDS = re.compile(r"[^\W\d_]+")
# Words that say nothing of what a phrase names.
_SMALL = frozenset("a an the of with and in on at to my his her its their this that".split())

Segmenter = Callable[[np.ndarray, str, tuple[float, float, float, float] | None], np.ndarray]
"""(image uint8 [H, W, 3], phrase, box (x0, y0, x1, y1) in shares of the sides, or None) -> bool
[H, W]: the pixels of what the phrase names. With a box the phrase may be empty."""

Captioner = Callable[[np.ndarray, np.ndarray], str]
"""(image uint8 [H, W, 3], mask bool [H, W]) -> a text that says what is inside the mask."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What fills in masks and texts that are missing; None where nothing does."""

    segment: Segmenter | None = None
    describe: Captioner | None = None


@dataclasses.dataclass(frozen=True)
class SubjectLine:
    """A subject as the line has it; paths are relative to the manifest's folder."""

    phrase: str | None
    mask: str | None
    box: tuple[float, float, float, float] | None
    reference: str | None
    reference_mask: str | None
    info: object


@dataclasses.dataclass(frozen=True)
class SceneLine:
    """A line whose text is in order."""

    caption: str | None
    chosen: str
    subjects: tuple[SubjectLine, ...]
    group: str | None
    info: object

    def files(self) -> dict[str, str]:
        """Field to path, of every file that the line names."""
        named = {"chosen": self.chosen}
        for i, subject in enumerate(self.subjects):
            for field in ("reference", "reference_mask", "mask"):
                if getattr(subject, field) is not None:
                    named[f"subjects[{i}].{field}"] = getattr(subject, field)
        return named


@dataclasses.dataclass
class LoadedSubject:
    """A subject with nothing missing.

    Attributes:
      phrase: what it is called.
      mask: bool [H, W], its pixels in the image.
      reference, reference_mask: uint8 [h, w, 3] and bool [h, w].
    """

    phrase: str | None
    mask: np.ndarray | None
    reference: np.ndarray | None
    reference_mask: np.ndarray | None


@dataclasses.dataclass
class LoadedScene:
    """A line's images. Before `fill` what the line lacks is None.

    Attributes:
      caption: what the image shows.
      image: uint8 [H, W, 3].
      subjects: in the order of the line.
    """

    caption: str | None
    image: np.ndarray
    subjects: list[LoadedSubject]


def parse_line(text: bytes, *, max_subjects: int, hooks: Hooks) -> SceneLine:
    """The line's content, every field checked on its own.

    Args:
      text: of the line.
      max_subjects: the most that a line may have.
      hooks: what may be missing is what one of these fills in.

    Raises:
      LineError: names the field and what would be right.
    """
    values = manifest.parse_object(text, _FIELDS)
    subjects = manifest.read_subjects(values, max_subjects)
    return SceneLine(
        caption=_told(values, "caption", manifest.CAPTION, hooks),
        chosen=manifest.read_path(values, "chosen"),
        subjects=tuple(_subject(s, f"subjects[{i}]", hooks) for i, s in enumerate(subjects)),
        group=manifest.read_group(values),
        info=values.get("info"),
    )


def _subject(values, where: str, hooks: Hooks) -> SubjectLine:
    manifest.check_subject(values, _SUBJECT_FIELDS, where)
    where += "."
    subject = SubjectLine(
        phrase=_told(values, "phrase", manifest.PHRASE, hooks, where),
        mask=manifest.read_path(values, "mask", where, optional=True),
        box=manifest.read_box(values, where),
        reference=manifest.read_path(values, "reference", where, optional=True),
        reference_mask=manifest.read_path(values, "reference_mask", where, optional=True),
        info=values.get("info"),
    )
    if subject.mask is None and subject.box is None and hooks.segment is None:
        raise LineError(
            where + "mask",
            "is missing; give the file of a mask, a box, or a --segmenter that finds it",
        )
    if subject.mask is None and subject.box is None and subject.phrase is None:
        raise LineError(
            where + "phrase",
            "is missing like the mask; give one of the two, by which the other can be found",
        )
    if subject.reference is None and subject.reference_mask is not None:
        raise LineError(
            where + "reference",
            "is missing beside a reference_mask; give both, or none to take what the mask cuts out",
        )
    if subject.reference is not None and subject.reference_mask is None and hooks.segment is None:
        raise LineError(
            where + "reference_mask",
            "is missing; give the file of a mask, or a --segmenter that finds it",
        )
    return subject


def _told(values, name, cure, hooks, where=""):
    """A text, None where a captioner will find it."""
    if values.get(name) is None and hooks.describe is not None:
        return None
    if name not in values:
        raise LineError(where + name, f"is missing; {cure}, or give a --captioner that does")
    return manifest.read_text(values, name, cure, where)


def load_scene(line: SceneLine, contents: dict[str, bytes], resolution: int) -> LoadedScene:
    """The images of a line, checked against each other.

    Args:
      line: what the manifest says.
      contents: field to content of every file of `line.files()`.
      resolution: side of the images that the generator draws.

    Raises:
      LineError: names the field, what is wrong and what would be right.
    """
    images, masks, _ = line_record.decode_files(line.files(), contents)
    shape = images["chosen"].shape[:2]
    line_record.check_resolution(shape, resolution)
    line_record.check_masks(masks, images)
    subjects = [
        LoadedSubject(
            subject.phrase,
            *(
                kind.get(f"subjects[{i}].{field}")
                for kind, field in (
                    (masks, "mask"),
                    (images, "reference"),
                    (masks, "reference_mask"),
                )
            ),
        )
        for i, subject in enumerate(line.subjects)
    ]
    scene = LoadedScene(line.caption, images["chosen"], subjects)
    for i, subject in enumerate(subjects):
        _check_subject(scene, subject, f"subjects[{i}].")
    return scene


def _check_subject(scene, subject, where):
    """Refuses a mask that no square holds, and a phrase that the caption does not know."""
    height, width = scene.image.shape[:2]
    if subject.mask is not None:
        extent = max(high - low for low, high in geometry.bounds(subject.mask))
        if extent > min(height, width):
            raise LineError(
                where + "mask",
                f"is {extent} pixels long and the shorter side of chosen "
                f"{min(height, width)}; crop the image so that a square holds the "
                "subject",
            )
    if None not in (scene.caption, subject.phrase):
        caption = scene.caption.casefold()
        words = [w for w in _WORDS.findall(subject.phrase.casefold()) if w not in _SMALL]
        if words and not any(word in caption for word in words):
            raise LineError(
                where + "phrase",
                f"= {subject.phrase[:60]!r} has no word in common with "
                "the caption, which is to name every subject; mend one of the two",
            )


def fill(
    scene: LoadedScene,
    line: SceneLine,
    hooks: Hooks,
    cut: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Makes up for what a scene lacks, in place.

    Args:
      scene: as `load_scene` gave it.
      line: where it came from.
      hooks: the same that the line was parsed with.
      cut: from an image and a mask to the subject alone and its mask.

    Raises:
      LineError: what a hook gave cannot be used.
    """
    shape = scene.image.shape[:2]
    for i, (subject, told) in enumerate(zip(scene.subjects, line.subjects, strict=True)):
        where = f"subjects[{i}]."
        if subject.mask is None and hooks.segment is not None:
            subject.mask = _segmented(hooks, scene.image, subject.phrase, told.box, where + "mask")
        elif subject.mask is None:
            subject.mask = geometry.box_mask(told.box, *shape)
        if subject.phrase is None:
            subject.phrase = _described(hooks, scene.image, subject.mask, where + "phrase")
        if subject.reference is None:
            subject.reference, subject.reference_mask = cut(scene.image, subject.mask)
        elif subject.reference_mask is None:
            subject.reference_mask = _segmented(
                hooks, subject.reference, subject.phrase, None, where + "reference_mask"
            )
    if scene.caption is None:
        scene.caption = _described(hooks, scene.image, np.ones(shape, bool), "caption")
    for i, subject in enumerate(scene.subjects):
        _check_subject(scene, subject, f"subjects[{i}].")


def _segmented(hooks, image, phrase, box, field):
    mask = np.asarray(hooks.segment(image, phrase or "", box))
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise LineError(
            field,
            f"by --segmenter is {mask.dtype} {list(mask.shape)}; it has to return "
            f"bool {list(image.shape[:2])}, the image's size",
        )
    if not mask.any():
        raise LineError(
            field,
            f"by --segmenter is empty: it finds no {phrase or 'subject'!r}; give "
            "the file of a mask",
        )
    return mask


def _described(hooks, image, mask, field):
    text = hooks.describe(image, mask)
    if not isinstance(text, str) or not text.strip():
        raise LineError(field, f"by --captioner is {text!r:.60}; it has to return a text")
    return text.strip()
