"""The preference record: a pair of images with the subjects they show, its checks, and batches.

A *record* is a dict; all sources return this form:

    index       int, position in the data set
    caption     str
    chosen      uint8 [H, W, 3], shows the reference subjects
    rejected    uint8 [H, W, 3], the same scene with other individuals
    prior_mask  bool [H, W], where the two may differ
    original_size  int32 [2], optional: height and width before the image was resized and cropped
    crop        int32 [2], optional: top and left of the crop, in the resized image
    background, changed_mask  int, and bool [H, W]: optional, Toybox's ground truth
    subjects    a list of 1 to S dicts:
      phrase          str, a noun phrase: "a star"
      reference       uint8 [R, R, 3], the subject; padded with white if the image was not square
      reference_mask  bool [R, R], the subject's pixels in it
      mask            bool [H, W], the subject's pixels in `chosen`
      box             float32 [4], x0, y0, x1, y1 in [0, 1], bounds of `mask`
      class_id, hue, pattern, pattern_hue, part, rejected_<each of these>, disrupted: optional,
                      Toybox's ground truth

An *example* is a record encoded for training by `encode`: arrays of fixed shape, with subjects
padded to S slots. Stacked examples form a `PreferenceBatch`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from flax import struct

from focusdpo_jax.data import geometry
from focusdpo_jax.errors import UserError

TRUTH = {
    "class_id": np.int32,
    "hue": np.float32,
    "pattern": np.int32,
    "pattern_hue": np.float32,
    "part": np.int32,
}
"""The attributes of a Toybox subject and their dtypes; see `toybox.Subject`."""

Tokenize = Callable[[str], np.ndarray]
"""Maps a caption to token ids, int32 [text encoders, length]."""


class Source(Protocol):
    """Entries by position: a list of records, or records that are read or rendered on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@struct.dataclass
class PreferenceBatch:
    """B pairs with S subject slots each, a pytree of arrays.

    Attributes:
      chosen, rejected: uint8 [B, H, W, 3].
      references: uint8 [B, S, R, R, 3], white in absent slots.
      reference_masks: bool [B, S, R, R], the subjects' pixels in `references`; empty where absent.
      masks: bool [B, S, H, W], the subjects' pixels in `chosen`; empty where absent.
      present: bool [B, S], which slots hold a subject. Subjects come first, in the order of the
        caption.
      prior_mask: bool [B, H, W], where chosen and rejected may differ.
      time_ids: float32 [B, 6], SDXL's size conditioning in pixels: original height and width, top
        and left of the crop, target height and width.
      token_ids: int32 [B, text encoders, length].
      index: int64 [B], positions in the data set; -1 in rows that pad an evaluation batch.
      truth: for Toybox, `class_id`, `hue`, `pattern`, `pattern_hue`, `part`, the same as
        `rejected_<name>`, and `disrupted`, each [B, S] with -1 (or False) where absent, and
        `background` [B]. Empty for photographs.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    references: np.ndarray
    reference_masks: np.ndarray
    masks: np.ndarray
    present: np.ndarray
    prior_mask: np.ndarray
    time_ids: np.ndarray
    token_ids: np.ndarray
    index: np.ndarray
    truth: dict[str, np.ndarray]


def encode(
    record: dict, *, tokenize: Tokenize, num_subjects: int, reference_size: int | None = None
) -> dict:
    """Encodes a record as an example: fields as in `PreferenceBatch`, without the batch axis.

    Args:
      record: one that `check_record` accepts.
      tokenize: maps a caption to token ids.
      num_subjects: number of slots (S).
      reference_size: side of the references (R), the image encoder's; None keeps the record's.
    """
    height, width = record["chosen"].shape[:2]
    subjects = record["subjects"]
    side = reference_size or len(subjects[0]["reference"])
    original = record.get("original_size", (height, width))
    example = {
        "chosen": record["chosen"],
        "rejected": record["rejected"],
        "references": np.full((num_subjects, side, side, 3), 255, np.uint8),
        "reference_masks": np.zeros((num_subjects, side, side), bool),
        "masks": np.zeros((num_subjects, height, width), bool),
        "present": np.arange(num_subjects) < len(subjects),
        "prior_mask": record["prior_mask"],
        "time_ids": np.array([*original, *record.get("crop", (0, 0)), height, width], np.float32),
        "token_ids": np.asarray(tokenize(record["caption"]), np.int32),
        "index": np.int64(record["index"]),
        "truth": _truth(record, num_subjects),
    }
    for slot, subject in enumerate(subjects):
        for name in ("reference", "reference_mask"):
            example[name + "s"][slot] = geometry.pad_to_square(subject[name], side)
        example["masks"][slot] = subject["mask"]
    return example


def _truth(record: dict, num_subjects: int) -> dict:
    if "background" not in record:
        return {}
    truth = {
        "background": np.int32(record["background"]),
        "disrupted": np.zeros(num_subjects, bool),
    }
    for slot, subject in enumerate(record["subjects"]):
        truth["disrupted"][slot] = subject["disrupted"]
    for name, dtype in TRUTH.items():
        for key in (name, f"rejected_{name}"):
            truth[key] = np.full(num_subjects, -1, dtype)
            for slot, subject in enumerate(record["subjects"]):
                truth[key][slot] = subject[key]
    return truth


# --- Checks ---------------------------------------------------------------------------------------


def check_record(record: dict, *, max_subjects: int) -> dict:
    """Returns the record unchanged if training can use it.

    Raises:
      UserError: the message has the record's index, the field, the fault and the cure.
    """
    sizes = {}  # The first image of each kind, whose size the others must have.

    def fail(field: str, problem: str):
        raise UserError(f"record {record.get('index', '?')}: {field} {problem}")

    def image(field: str, value, like: str = "chosen") -> None:
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3:
            kind = (
                f"{value.dtype} {list(value.shape)}"
                if isinstance(value, np.ndarray)
                else repr(value)
            )
            fail(field, f"is {kind[:60]}; an RGB image, uint8 [height, width, 3], is needed")
        if value.shape[2] != 3:
            fail(field, f"has {value.shape[2]} channels; convert it to RGB")
        sizes.setdefault(like, value)
        same_size(field, value, like)

    def same_size(field: str, value, like: str) -> None:
        if value.shape[:2] != sizes[like].shape[:2]:
            fail(field, f"is {_size(value)} pixels and {like} is {_size(sizes[like])}; resize it")

    def mask(field: str, value, like: str = "chosen") -> None:
        if not isinstance(value, np.ndarray) or value.dtype != bool or value.ndim != 2:
            fail(field, "is not a mask, bool [height, width]")
        same_size(field, value, like)
        if not value.any():
            fail(field, "is empty; mark the pixels it is about, or leave the record out")

    for field in ("caption", "chosen", "rejected", "prior_mask", "subjects"):
        if field not in record:
            fail(field, "is missing")
    if not record["caption"].strip():
        fail("caption", "is empty; describe the image")
    image("chosen", record["chosen"])
    image("rejected", record["rejected"])
    if np.array_equal(record["chosen"], record["rejected"]):
        fail("rejected", "equals chosen; a pair needs a difference to learn from, leave it out")
    mask("prior_mask", record["prior_mask"])
    count = len(record["subjects"])
    if not 1 <= count <= max_subjects:
        fail("subjects", f"has {count} entries; 1 to {max_subjects} fit")
    for slot, subject in enumerate(record["subjects"]):
        where = f"subjects[{slot}]."
        for field in ("phrase", "reference", "reference_mask", "mask"):
            if field not in subject:
                fail(where + field, "is missing")
        image(where + "reference", subject["reference"], "subjects[0].reference")
        height, width = subject["reference"].shape[:2]
        if height != width:
            fail(where + "reference", f"is {height} x {width} pixels; pad it to a square")
        mask(where + "reference_mask", subject["reference_mask"], "subjects[0].reference")
        mask(where + "mask", subject["mask"])
    return record


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"
