"""Parses manifests of `disrupt`: images with subjects, without rejected images (docs/data.md).

A line has the fields of a line of `manifest` except `rejected` and `prior_mask`. Missing masks come
from a segmenter and missing texts from a captioner, if these are given; a missing reference is the
subject's cut-out.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.data import geometry, line_record, manifest
from focusdpo_jax.data.manifest import LineError

_FIELDS = ("caption", "chosen", "subjects", "group", "info")
_SUBJECT_FIELDS = ("reference", "reference_mask", "phrase", "mask", "box", "info")
_WORDS = re.compile(r"[^\W\d_]+")
# Function words, which do not identify the noun of a phrase.
SMALL_WORDS = frozenset("a an the of with and in on at to my his her its their this that".split())

Segmenter = Callable[[np.ndarray, str, tuple[float, float, float, float] | None], np.ndarray]
"""(image uint8 [H, W, 3], phrase, box (x0, y0, x1, y1) in [0, 1], or None) -> bool [H, W]: the
pixels of the object that the phrase names. With a box the phrase may be empty."""

Captioner = Callable[[np.ndarray, np.ndarray], str]
"""(image uint8 [H, W, 3], mask bool [H, W]) -> a text that describes the content of the mask."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that supply missing masks and texts, or None."""

    segment: Segmenter | None = None
    describe: Captioner | None = None


@dataclasses.dataclass(frozen=True)
class SubjectLine:
    """A subject as written in the line; paths are relative to the manifest's folder."""

    phrase: str | None
    mask: str | None
    box: tuple[float, float, float, float] | None
    reference: str | None
    reference_mask: str | None
    info: object


@dataclasses.dataclass(frozen=True)
class SceneLine:
    """A line with valid text."""

    caption: str | None
    chosen: str
    subjects: tuple[SubjectLine, ...]
    group: str | None
    info: object

    def files(self) -> dict[str, str]:
        """Returns {field: path} of every file that the line refers to."""
        named = {"chosen": self.chosen}
        for i, subject in enumerate(self.subjects):
            for field in ("reference", "reference_mask", "mask"):
                if getattr(subject, field) is not None:
                    named[f"subjects[{i}].{field}"] = getattr(subject, field)
        return named


@dataclasses.dataclass(frozen=True)
class LoadedSubject:
    """A subject with its decoded images. Missing parts are None; `fill` supplies them.

    Attributes:
      phrase: noun phrase of the subject.
      mask: bool [H, W], its pixels in the image.
      reference, reference_mask: uint8 [h, w, 3] and bool [h, w].
    """

    phrase: str | None
    mask: Mask | None
    reference: RGBImage | None
    reference_mask: Mask | None


@dataclasses.dataclass(frozen=True)
class Subject(LoadedSubject):
    """A subject without missing parts."""

    phrase: str
    mask: Mask
    reference: RGBImage
    reference_mask: Mask


@dataclasses.dataclass(frozen=True)
class LoadedScene:
    """A line with its decoded images. Missing parts are None; `fill` supplies them.

    Attributes:
      caption: text that describes the image.
      image: uint8 [H, W, 3].
      subjects: subjects in the order of the line.
    """

    caption: str | None
    image: RGBImage
    subjects: Sequence[LoadedSubject]


@dataclasses.dataclass(frozen=True)
class Scene(LoadedScene):
    """A scene without missing parts."""

    caption: str
    subjects: Sequence[Subject]


def parse_line(text: bytes, *, max_subjects: int, hooks: Hooks) -> SceneLine:
    """Parses a line and checks every field on its own.

    Args:
      text: text of the line.
      max_subjects: largest number of subjects of a line.
      hooks: determine which fields may be missing.

    Raises:
      LineError: the message has the field and the cure.
    """
    values = manifest.parse_object(text, _FIELDS)
    subjects = manifest.read_subjects(values, max_subjects)
    return SceneLine(
        caption=_read_or_none(values, "caption", manifest.CAPTION, hooks),
        chosen=manifest.read_path(values, "chosen"),
        subjects=tuple(_subject(s, f"subjects[{i}]", hooks) for i, s in enumerate(subjects)),
        group=manifest.read_group(values),
        info=values.get("info"),
    )


def _subject(values, where: str, hooks: Hooks) -> SubjectLine:
    manifest.check_subject(values, _SUBJECT_FIELDS, where)
    where += "."
    subject = SubjectLine(
        phrase=_read_or_none(values, "phrase", manifest.PHRASE, hooks, where),
        mask=manifest.read_optional_path(values, "mask", where),
        box=manifest.read_box(values, where),
        reference=manifest.read_optional_path(values, "reference", where),
        reference_mask=manifest.read_optional_path(values, "reference_mask", where),
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
            "is missing, and so is the mask; give one of the two, from which the other is derived",
        )
    if subject.reference is None and subject.reference_mask is not None:
        raise LineError(
            where + "reference",
            "is missing, but there is a reference_mask; give both, or none to use the cut-out by "
            "the mask",
        )
    if subject.reference is not None and subject.reference_mask is None and hooks.segment is None:
        raise LineError(
            where + "reference_mask",
            "is missing; give the file of a mask, or a --segmenter that finds it",
        )
    return subject


def _read_or_none(values: dict, name: str, cure: str, hooks: Hooks, where: str = "") -> str | None:
    """Returns the text of a field; None if it is missing and a captioner will write it."""
    if values.get(name) is None and hooks.describe is not None:
        return None
    if name not in values:
        raise LineError(where + name, f"is missing; {cure}, or give a --captioner that does")
    return manifest.read_text(values, name, cure, where)


def load_scene(line: SceneLine, contents: Mapping[str, bytes], resolution: int) -> LoadedScene:
    """Decodes the images of a line and checks them against each other.

    Args:
      line: the parsed line.
      contents: {field: content} of every file of `line.files()`.
      resolution: side of the generated images.

    Raises:
      LineError: the message has the field, the fault and the cure.
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


def _check_subject(scene: LoadedScene, subject: LoadedSubject, where: str) -> None:
    """Raises LineError for a mask that no square contains, or a phrase unrelated to the caption."""
    height, width = scene.image.shape[:2]
    if subject.mask is not None:
        extent = max(high - low for low, high in geometry.bounds(subject.mask))
        if extent > min(height, width):
            raise LineError(
                where + "mask",
                f"is {extent} pixels long and the shorter side of chosen "
                f"{min(height, width)}; crop the image so that a square contains the "
                "subject",
            )
    if scene.caption is not None and subject.phrase is not None:
        caption = scene.caption.casefold()
        words = [w for w in _WORDS.findall(subject.phrase.casefold()) if w not in SMALL_WORDS]
        if words and not any(word in caption for word in words):
            raise LineError(
                where + "phrase",
                f"= {subject.phrase[:60]!r} has no word in common with "
                "the caption, which must name every subject; correct one of the two",
            )


def fill(
    scene: LoadedScene,
    line: SceneLine,
    hooks: Hooks,
    cut: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Scene:
    """Returns a scene with its missing parts supplied.

    Args:
      scene: result of `load_scene`.
      line: the line that it was loaded from.
      hooks: the hooks with which the line was parsed.
      cut: maps an image and a mask to the cut-out subject and its mask.

    Raises:
      LineError: the result of a hook cannot be used.
    """
    shape, subjects = scene.image.shape[:2], []
    for i, (subject, written) in enumerate(zip(scene.subjects, line.subjects, strict=True)):
        where = f"subjects[{i}]."
        if subject.mask is not None:
            mask = subject.mask
        elif hooks.segment is not None:
            mask = _segmented(hooks, scene.image, subject.phrase, written.box, where + "mask")
        else:
            assert written.box is not None  # `parse_line` requires it.
            mask = geometry.box_mask(written.box, *shape)
        phrase, reference = subject.phrase, subject.reference
        if phrase is None:
            phrase = _described(hooks, scene.image, mask, where + "phrase")
        if reference is None:
            reference, reference_mask = cut(scene.image, mask)
        elif subject.reference_mask is not None:
            reference_mask = subject.reference_mask
        else:
            reference_mask = _segmented(hooks, reference, phrase, None, where + "reference_mask")
        subjects.append(Subject(phrase, mask, reference, reference_mask))
    caption = scene.caption
    if caption is None:
        caption = _described(hooks, scene.image, np.ones(shape, bool), "caption")
    filled = Scene(caption, scene.image, subjects)
    for i, subject in enumerate(filled.subjects):
        _check_subject(filled, subject, f"subjects[{i}].")
    return filled


def _segmented(
    hooks: Hooks,
    image: RGBImage,
    phrase: str | None,
    box: tuple[float, float, float, float] | None,
    field: str,
) -> Mask:
    assert hooks.segment is not None  # `parse_line` requires it or a mask.
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


def _described(hooks: Hooks, image: RGBImage, mask: Mask, field: str) -> str:
    assert hooks.describe is not None  # `parse_line` requires it or a text.
    text = hooks.describe(image, mask)
    if not isinstance(text, str) or not text.strip():
        raise LineError(field, f"by --captioner is {text!r:.60}; it has to return a text")
    return text.strip()
