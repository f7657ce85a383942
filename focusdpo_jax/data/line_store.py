"""Converts manifest lines to records in worker processes, and stores them during a build.

A converted line is a zip file named after a hash of everything it depends on, including the content
of its images. A restart reuses the lines that earlier runs converted, unless they have changed.
Imports neither JAX nor TFDS, because every worker process imports this module.
"""

import dataclasses
import hashlib
import json
import signal
import zipfile

import cv2
import numpy as np
from etils import epath

from focusdpo_jax.data import manifest
from focusdpo_jax.data.images import encode_png, is_converted
from focusdpo_jax.data.line_record import ImageSizes, make_record
from focusdpo_jax.data.manifest import LineError
from focusdpo_jax.files import new_file

_FORMAT = 2  # Increment when the same line would give another record.


@dataclasses.dataclass(frozen=True)
class LineJob:
    """A line to convert.

    Attributes:
      number: number of the line, from 1.
      text: its bytes.
      tokens: number of tokens of its caption, or None.
      root: the folder that its paths are relative to.
      store: folder of converted lines; None computes the digest alone.
      sizes, max_subjects: arguments of `make_record` and `parse_line`.
    """

    number: int
    text: bytes
    tokens: int | None
    root: str
    store: str | None
    sizes: ImageSizes
    max_subjects: int


def process_line(job: LineJob) -> dict:
    """Builds and stores a line's record, unless it is stored already.

    Returns:
      JSON values: line (its number), digest (hash of its inputs), and either refused ([field,
      reason]) or facts (see `line_record`); neither if `job.store` is None.
    """
    outcome = {"line": job.number, "digest": hashlib.sha256(job.text).hexdigest()}
    try:
        line = manifest.parse_line(job.text, max_subjects=job.max_subjects)
        manifest.check_tokens(line.caption, job.tokens)
        contents = {
            field: manifest.read_file(job.root, path, field) for field, path in line.files().items()
        }
        settings = [_FORMAT, *dataclasses.astuple(job.sizes)]
        parts = [hashlib.sha256(content).hexdigest() for content in contents.values()]
        if any(map(is_converted, contents.values())):
            settings.append("colour profiles")  # Earlier versions ignored profiles.
        outcome["digest"] = hashlib.sha256(
            json.dumps([settings, outcome["digest"], parts]).encode()
        ).hexdigest()
        if job.store is None:
            return outcome
        path = entry_path(job.store, outcome["digest"])
        facts = _facts(path)
        if facts is None:
            record, facts = make_record(line, contents, job.sizes)
            _write(path, record, facts)
        return outcome | {"facts": facts}
    except LineError as error:
        return outcome | {"refused": [error.field, error.reason]}
    except MemoryError:
        return outcome | {
            "refused": [
                "",
                "has images that do not fit into memory; scale them down, or give fewer --workers",
            ]
        }


def start_worker() -> None:
    """Ignores SIGINT, which the parent process handles, and limits OpenCV to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)


def entry_path(store: epath.PathLike, digest: str) -> epath.Path:
    """Returns the path at which a converted line is stored."""
    return epath.Path(store) / digest[:2] / f"{digest}.zip"


def _facts(path: epath.Path) -> dict | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return json.loads(archive.read("facts.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # Truncated by a crash: the line is converted again.


def _write(path: epath.Path, record: dict, facts: dict) -> None:
    images, values = {}, {"subjects": [{} for _ in record["subjects"]]}
    for entry, target, prefix in [
        (record, values, ""),
        *(
            (subject, values["subjects"][i], f"{i}.")
            for i, subject in enumerate(record["subjects"])
        ),
    ]:
        for name, value in entry.items():
            if isinstance(value, np.ndarray) and value.ndim > 1:
                images[prefix + name] = encode_png(value)
            elif name != "subjects":
                target[name] = value.tolist() if isinstance(value, np.ndarray) else value
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("facts.json", json.dumps(facts))
        archive.writestr("record.json", json.dumps(values))
        for name, content in images.items():
            archive.writestr(f"{name}.png", content)


@dataclasses.dataclass(frozen=True)
class LineStoreSource:
    """Records of converted lines, with images as the content of PNG files."""

    paths: list[epath.Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        with self.paths[index].open("rb") as file, zipfile.ZipFile(file) as archive:
            record = json.loads(archive.read("record.json"))
            for name in archive.namelist():
                if name.endswith(".png"):
                    slot, _, field = name.removesuffix(".png").rpartition(".")
                    entry = record["subjects"][int(slot)] if slot else record
                    entry[field] = archive.read(name)
        for subject in record["subjects"]:
            subject["box"] = np.array(subject["box"], np.float32)
        for name in ("original_size", "crop"):
            record[name] = np.array(record[name], np.int32)
        return record
