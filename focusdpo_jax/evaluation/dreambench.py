"""DreamBench's scenes, from the user's copy: subjects with prompts, or scenes in UNO's layout.

The benchmark (DreamBooth, arXiv 2208.12242) is github.com/google/dreambooth's `dataset` folder: a
folder of photographs for each of 30 subjects, and `prompts_and_classes.txt` with 25 prompts for
objects and 25 for animals. Scenes of several subjects come as github.com/bytedance/UNO has them: a
JSON list of {"prompt", "image_paths"}, paths relative to the file.
"""

import collections
import json
import os
import re

from absl import logging
from etils import epath

from focusdpo_jax.data import dreambench
from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject
from focusdpo_jax.inference.prompts import Reference

PROTOCOLS = ("all", "one")
"""What images are compared with: every photograph of the subject, as DreamBooth does it, or the
one that the generator was given, as Kosmos-G (arXiv 2310.02992) does it."""

_LIVE = ("cat", "dog")  # Classes with the prompts for living subjects.
_PROMPT = re.compile(r"""^\s*(['"])(?P<text>.*\{1\}.*)\1\s*\.format""")
_FIELDS = {"prompt", "image_paths", "image_tgt_path", "boxes"}


def single(folder, *, protocol, samples, seed):
    """Every subject of a folder with every prompt.

    Args:
      folder: the benchmark's `dataset` folder, `prompts_and_classes.txt` in it or beside it.
      protocol: one of PROTOCOLS.
      samples: images of each subject and prompt.
      seed: of the first image; each further one has one more.

    Returns:
      A list of BenchmarkScene, a group a subject. The generator is given a subject's first photograph. The
      prompts are without the unique token, which only fine-tuned generators know.

    Raises:
      UserError: the folder is not laid out so.
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


def listed(path, folder, *, protocol, samples, seed):
    """The scenes of a JSON file in UNO's layout.

    Args:
      path: of the file: a list of objects with `prompt`, `image_paths` (one to N images in the
        order of the prompt, relative to the file) and, our addition, `boxes` (for each of them x0,
        y0, x1, y1 in [0, 1], where it is to stand).
      folder: the benchmark's folder, where images that are not where `path` says are looked for
        by their last two names (dog/00.jpg); None for no such folder.
      protocol, samples, seed: as in `single`.

    Returns:
      A list of BenchmarkScene; scenes of the same subjects are one group. The images of a folder are
      photographs of one subject, its name is the folder's; or each shows a subject of its own,
      with its file's name (see `_is_flat`).

    Raises:
      UserError: names the entry and what is wrong with it.
    """
    path = epath.Path(path)
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--scenes={path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"--scenes={path} is no JSON: {error}.") from error
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


def _entry(entry, base, folder):
    """[(path, box or None)] of the references of an entry."""
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
    for name, box in zip(paths, boxes):
        candidates = [base / name] + (
            [] if folder is None else [epath.Path(folder).joinpath(*epath.Path(name).parts[-2:])]
        )
        found = next((path for path in candidates if path.exists()), None)
        if found is None:
            raise UserError(
                f"{name} is not there; give --dreambench with the folder of the "
                "subjects, or paths relative to the file."
            )
        box = None if box is None else tuple(box) if isinstance(box, list) else (box,)
        Reference(str(found), box=box)  # Names a box that is none.
        references.append((found, box))
    return references


class _Subjects:
    """From the references of a list to subjects: whose photographs lie beside them."""

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
        # {what is one subject: its name}, longer where two have one name.
        keys = {self._identity(reference) for references in found for reference, _ in references}
        named = collections.Counter(map(_name, keys))
        self._names = {key: _name(key) if named[_name(key)] == 1 else _name(key, 2) for key in keys}
        for key, used in uses.items():
            images = sorted({p.name for _, images in used for p in images})
            if key in self._flat:
                logging.info("--scenes: every image in %s is a subject of its own", key)
            elif len(images) > 1:
                logging.warning(
                    "--scenes: the images in %s (%s and others) are taken for photographs of one "
                    "subject; if they show several, name each after what it shows",
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


def _is_flat(folder, used, table):
    """Whether each image of a folder shows a subject of its own, rather than all the same one.

    The list's layout does not state it. It is so if an entry names two images of the folder. Otherwise
    it is not where every prompt has the folder's name; and it is if the images that are named
    differ by more than numbers (dog.png, cat.png; not 00.jpg, 02.jpg), or if a prompt has the
    file's name ("a dog", references/dog.png). A folder that prompts_and_classes.txt lists is one
    subject's.

    Args:
      folder: its path.
      used: [(prompt, set of the folder's images that the entry names)].
      table: text of prompts_and_classes.txt, or "".
    """
    name = os.path.basename(folder)
    if re.search(rf"^\s*{re.escape(name)},", table, re.MULTILINE):
        return False
    if any(len(images) > 1 for _, images in used):
        return True
    if all(_words(name) & _words(prompt) for prompt, _ in used):
        return False
    if len({_words(p.stem) for _, images in used for p in images}) > 1:
        return True
    return any(
        _words(p.stem) and _words(p.stem) <= _words(prompt)
        for prompt, images in used
        for p in images
    )


def _words(text):
    """The words in a name or a prompt, without numbers."""
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def _key(path):
    """A path as text, the same for `a/../b` and `b`."""
    text = os.fspath(path)
    return text if "://" in text else os.path.normpath(text)


def _name(key, parts=1):
    return "/".join(epath.Path(key).parts[-parts:])


def _subject(photos, reference, kind, protocol, box=None, name=None):
    compared = photos if protocol == "all" else [reference]
    return BenchmarkSubject(
        name or reference.parent.name,
        dreambench.with_article(kind),
        str(reference),
        tuple(map(str, compared)),
        box,
    )


def _photographs(folder):
    if not folder.is_dir():
        raise UserError(f"--dreambench={folder} is no folder; give DreamBench's dataset folder.")
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


def _images(folder):
    return sorted(path for path in folder.iterdir() if dreambench.PHOTO.match(path.name))


def _listing(folder):
    """The text of prompts_and_classes.txt in or beside the folder, or ""."""
    if folder is not None:
        for place in (epath.Path(folder), epath.Path(folder).parent):
            if (place / "prompts_and_classes.txt").exists():
                return (place / "prompts_and_classes.txt").read_text()
    return ""


def _prompts(listing):
    """(prompts for objects, prompts for animals), with {0} for the token and {1} for the class."""
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
