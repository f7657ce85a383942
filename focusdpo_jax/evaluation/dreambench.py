"""Scenes from the user's copy of DreamBench, or from a list in UNO's layout.

The benchmark (DreamBooth, arXiv 2208.12242) is the `dataset` folder of
github.com/google/dreambooth: a folder of photographs for each of 30 subjects, and
`prompts_and_classes.txt` with 25 prompts for objects and 25 for animals. Scenes of several subjects
have the layout of github.com/bytedance/UNO: a JSON list of {"prompt", "image_paths"}, with paths
relative to the file.
"""

import collections
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

from focusdpo_jax.data import dreambench
from focusdpo_jax.data.scene_manifest import SMALL_WORDS
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.inference.prompts import Reference

PROTOCOLS = ("all", "one")
"""The photographs that images are compared with: all of the subject, as in DreamBooth, or the one
that is the reference, as in Kosmos-G (arXiv 2310.02992)."""

_LIVE = ("cat", "dog")  # Classes with the prompts for living subjects.
_PROMPT = re.compile(r"""^\s*(['"])(?P<text>.*\{1\}.*)\1\s*\.format""")
_FIELDS = {"prompt", "image_paths", "image_tgt_path", "boxes"}


def single(
    folder: epath.PathLike, *, protocol: str, samples: int, seed: int
) -> list[BenchmarkScene]:
    """Returns scenes of every subject of a folder with every prompt.

    Args:
      folder: the benchmark's `dataset` folder, with `prompts_and_classes.txt` in it or beside it.
      protocol: one of PROTOCOLS.
      samples: images of each subject and prompt.
      seed: seed of the first image; image i has seed + i.

    Returns:
      A list of BenchmarkScene, one group per subject. The reference is a subject's first
      photograph. The prompts omit the unique token, which only fine-tuned generators have learned.

    Raises:
      UserError: the folder has another layout.
    """
    folder = epath.Path(folder)
    photos = _photographs(folder)
    listed = _listing(folder)
    prompts = _prompts(listed)
    classes = dreambench.classes(listed, photos)
    scenes = []
    for subject, paths in photos.items():
        kind = classes[subject]
        given = _subject(paths, paths[0], kind, protocol)
        for i, prompt in enumerate(prompts[kind in _LIVE]):
            text = " ".join(prompt.format("", kind).split())
            for sample in range(samples):
                scenes.append(
                    BenchmarkScene(
                        f"{subject}/{i:02d}_{sample}", text, (given,), seed + len(scenes), subject
                    )
                )
    return scenes


def listed(
    path: epath.PathLike, folder: epath.PathLike | None, *, protocol: str, samples: int, seed: int
) -> list[BenchmarkScene]:
    """Returns the scenes of a JSON file in UNO's layout.

    Args:
      path: path of the file: a list of objects with `prompt`, `image_paths` (one to N images in the
        order of the prompt, relative to the file) and, as an extension, `boxes` (for each of them
        x0, y0, x1, y1 in [0, 1], the region of the subject in the generated image).
      folder: the benchmark's folder, searched for images that are missing at their path, by the
        last two parts of the path (dog/00.jpg); None for no such folder.
      protocol, samples, seed: see `single`.

    Returns:
      A list of BenchmarkScene; scenes of the same subjects are one group. The images of a folder
      are photographs of one subject with the folder's name; or each shows a subject of its own with
      the file's name (see `_is_flat`).

    Raises:
      UserError: the message has the entry's number and the fault.
    """
    path = epath.Path(path)
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--scenes={path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"--scenes={path} is not JSON: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"--scenes={path}: give a list of scenes, such as "
            '[{"prompt": "a dog and a cat", "image_paths": ["dog/00.jpg", '
            '"cat/00.jpg"]}].'
        )
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(_entry(entry, path.parent, folder))
        except UserError as error:
            raise UserError(f"--scenes={path}, entry {number}: {error}") from error
    subjects = _Subjects(path, _listing(folder), entries, found, protocol)
    scenes = []
    for number, (entry, references) in enumerate(zip(entries, found)):
        given = tuple(subjects(reference, box) for reference, box in references)
        for sample in range(samples):
            scenes.append(
                BenchmarkScene(
                    f"{number:04d}_{sample}",
                    entry["prompt"],
                    given,
                    seed + len(scenes),
                    "+".join(s.name for s in given),
                )
            )
    return scenes


def _entry(
    entry: Any, base: epath.Path, folder: epath.PathLike | None
) -> list[tuple[epath.Path, tuple | None]]:
    """Returns [(path, box or None)] of the references of an entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError("it has no prompt.")
    if set(entry) - _FIELDS:
        raise UserError(
            f"unknown field {min(set(entry) - _FIELDS)!r}; known: {', '.join(sorted(_FIELDS))}."
        )
    paths = entry.get("image_paths")
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise UserError("image_paths must be a list of one or more paths.")
    boxes = entry.get("boxes", [None] * len(paths))
    if not isinstance(boxes, list) or len(boxes) != len(paths):
        raise UserError(f"boxes must be a list of {len(paths)}, one for each of image_paths.")
    references = []
    for name, given in zip(paths, boxes):
        candidates = [base / name] + (
            [] if folder is None else [epath.Path(folder).joinpath(*epath.Path(name).parts[-2:])]
        )
        found = next((path for path in candidates if path.exists()), None)
        if found is None:
            raise UserError(
                f"{name} does not exist; give --dreambench with the folder of the "
                "subjects, or paths relative to the file."
            )
        box: Any = tuple(given) if isinstance(given, list) else (given,)
        box = None if given is None else box
        Reference(str(found), box=box)  # Raises UserError for an invalid box.
        references.append((found, box))
    return references


class _Subjects:
    """Maps the references of a list to subjects, with the photographs beside them."""

    def __init__(self, path, table, entries, found, protocol):
        self._table, self._protocol = table, protocol
        uses = collections.defaultdict(list)  # Folder to [(prompt, its images in the entry)].
        for entry, references in zip(entries, found):
            inside = collections.defaultdict(set)
            for reference, _ in references:
                inside[_key(reference.parent)].add(reference)
            for key, images in inside.items():
                uses[key].append((entry["prompt"], images))
        self._flat = {
            key
            for key, used in uses.items()
            if _is_flat(key, used, table) or key == _key(path.parent)
        }
        # {identity of a subject: its name}; names are extended by the parent folder if ambiguous.
        keys = {self._identity(reference) for references in found for reference, _ in references}
        named = collections.Counter(map(_name, keys))
        self._names = {key: _name(key) if named[_name(key)] == 1 else _name(key, 2) for key in keys}
        for key, used in uses.items():
            images = sorted({p.name for _, images in used for p in images})
            if key in self._flat:
                logging.info("--scenes: every image in %s is treated as a separate subject", key)
            elif len(images) > 1:
                logging.warning(
                    "--scenes: the images in %s (%s and others) are treated as photographs of one "
                    "subject; if they show several, name each file after its subject",
                    key,
                    " and ".join(images[:2]),
                )

    def _identity(self, reference):
        parent = _key(reference.parent)
        return _key(reference.with_suffix("")) if parent in self._flat else parent

    def __call__(self, reference, box):
        flat = _key(reference.parent) in self._flat
        around = [] if flat else _images(reference.parent)
        if reference not in around:
            around = [reference, *around]
        own = reference.stem if flat else reference.parent.name
        kind = dreambench.classes(self._table, [own])[own].strip(" -") or "subject"
        return _subject(
            around, reference, kind, self._protocol, box, self._names[self._identity(reference)]
        )


def _is_flat(folder: str, used: list[tuple[str, set[epath.Path]]], table: str) -> bool:
    """Returns whether the images of a folder show different subjects instead of the same one.

    The layout does not state it. Rules, in this order: a folder that prompts_and_classes.txt lists
    is one subject's; it is flat if an entry has two images of the folder; it is not flat if every
    prompt shares a word with the folder's name; it is flat if the names of the listed images differ by more than
    numbers (dog.png, cat.png; not 00.jpg, 02.jpg), or if a prompt has the file's name ("a dog",
    references/dog.png).

    Args:
      folder: its path.
      used: [(prompt, set of the folder's images that the entry refers to)].
      table: text of prompts_and_classes.txt, or "".
    """
    name = os.path.basename(folder)
    if re.search(rf"^\s*{re.escape(name)},", table, re.MULTILINE):
        return False
    if any(len(images) > 1 for _, images in used):
        return True
    if all((_words(name) - SMALL_WORDS) & _words(prompt) for prompt, _ in used):
        return False
    if len({_words(p.stem) for _, images in used for p in images}) > 1:
        return True
    return any(
        _words(p.stem) and _words(p.stem) <= _words(prompt)
        for prompt, images in used
        for p in images
    )


def _words(text: str) -> frozenset[str]:
    """Returns the words of a name or a prompt, without numbers."""
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def _key(path: epath.PathLike) -> str:
    """Returns a path as normalised text, the same for `a/../b` and `b`."""
    text = os.fspath(path)
    return text if "://" in text else os.path.normpath(text)


def _name(key: str, parts: int = 1) -> str:
    return "/".join(epath.Path(key).parts[-parts:])


def _subject(
    photos: Sequence[epath.Path],
    reference: epath.Path,
    kind: str,
    protocol: str,
    box: tuple | None = None,
    name: str | None = None,
) -> BenchmarkSubject:
    compared = photos if protocol == "all" else [reference]
    return BenchmarkSubject(
        name or reference.parent.name,
        dreambench.with_article(kind),
        str(reference),
        tuple(map(str, compared)),
        box,
    )


def _photographs(folder: epath.Path) -> dict[str, list[epath.Path]]:
    if not folder.is_dir():
        raise UserError(f"--dreambench={folder} is not a folder; give DreamBench's dataset folder.")
    photos = {
        subject.name: _images(subject) for subject in sorted(folder.iterdir()) if subject.is_dir()
    }
    photos = {subject: paths for subject, paths in photos.items() if paths}
    if not photos:
        raise UserError(
            f"--dreambench={folder} has no folders with photographs; give DreamBench's "
            "dataset folder, with backpack/00.jpg and so on."
        )
    return photos


def _images(folder: epath.Path) -> list[epath.Path]:
    return sorted(path for path in folder.iterdir() if dreambench.PHOTO.match(path.name))


def _listing(folder: epath.PathLike | None) -> str:
    """Returns the text of prompts_and_classes.txt in or beside the folder, or ""."""
    if folder is not None:
        for place in (epath.Path(folder), epath.Path(folder).parent):
            if (place / "prompts_and_classes.txt").exists():
                return (place / "prompts_and_classes.txt").read_text()
    return ""


def _prompts(listing: str) -> tuple[list[str], list[str]]:
    """Returns the prompts for objects and animals, with {0} for the token and {1} for the class."""
    lists, current = ([], []), None
    for line in listing.splitlines():
        if "live subject prompts" in line.lower():
            current = lists[1]
        elif "object prompts" in line.lower():
            current = lists[0]
        match = _PROMPT.match(line)
        if match and current is not None:
            current.append(match["text"])
    if not all(lists):
        raise UserError(
            "--dreambench: there is no prompts_and_classes.txt with DreamBench's "
            "prompts in the folder or beside it; copy it from the benchmark."
        )
    return lists
