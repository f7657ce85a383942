"""Data sets of preference records: rendered on demand, or built once with TFDS and read back.

`prepare` writes data sets of the user's own images in the same form. Neither building nor reading
imports TensorFlow: TFDS has its own protocol buffers, NumPy decoding and ArrayRecord files. A built
data set is a directory `<data_dir>/preference_pairs/<name>-<fingerprint>/<version>/`. The
fingerprint covers the settings that produced it, so that another seed or size never reads the
wrong files.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging as python_logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import logging
from etils import epath

from focusdpo_jax import toybox
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import no_room

if TYPE_CHECKING:
    from focusdpo_jax.config import RunConfig
    from focusdpo_jax.data.record import Source

# Modules of `toybox` that determine its records; their source is part of the fingerprint.
_WORLD = ("world", "subjects", "rendering", "silhouettes", "backgrounds", "nuisances")
_PACKAGE = str(epath.Path(__file__).parent.parent)
PAIRS = "pairs"
"""Name of the data set's folder in the output folder of `prepare`."""


@dataclasses.dataclass(frozen=True)
class ToyboxSource:
    """The first `size` records of a split of a Toybox world, rendered on access."""

    world: toybox.World
    split: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.world.record(self.split, int(index))


def toybox_world(config: "RunConfig") -> toybox.World:
    """Returns the Toybox world that a run's configuration describes.

    Args:
      config: RunConfig, of which `resolution` and `data` are read.
    """
    data = config.data
    return toybox.World(
        data.seed,
        config.resolution,
        tuple(data.subject_counts),
        data.leak_probability,
        tuple(data.subject_radii),
        data.pattern_scale,
        data.same_class_probability,
        data.one_look_probability,
        data.nuisance_probability,
        data.prior_mask,
        data.oracle_mask,
        data.second_reference_probability,
    )


def build_toybox(
    data_dir: epath.PathLike, world: toybox.World, sizes: Mapping[str, int]
) -> epath.Path:
    """Builds a Toybox data set with `sizes[split]` records a split, unless it exists.

    Returns:
      The data set's directory.

    Raises:
      UserError: as `build`, or a size is below 1.
    """
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"size of Toybox split {split!r} is {size}; it must be at least 1")
    sources = {split: ToyboxSource(world, split, size) for split, size in sizes.items()}
    settings = {**dataclasses.asdict(world), "sizes": dict(sizes), "world": _world_fingerprint()}
    return build(data_dir, "toybox", sources, settings, max_subjects=world.max_subjects)


def _world_fingerprint() -> str:
    """Returns a hash of the renderer's source code, so that outdated images are never read."""
    folder = epath.Path(toybox.__file__).parent
    sources = ((folder / f"{name}.py").read_bytes() for name in _WORLD)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def build(
    data_dir: epath.PathLike,
    name: str,
    sources: "Mapping[str, Source]",
    settings: Mapping[str, Any],
    *,
    max_subjects: int,
) -> epath.Path:
    """Writes records as a TFDS data set of ArrayRecord files, unless a complete one exists.

    TFDS writes under a temporary name and renames at the end. A build that was killed leaves nothing
    that is read as a data set; the next build starts from the beginning.

    Args:
      data_dir: parent directory of all data sets, on any file system that `epath` supports.
      name: first part of the directory's name.
      sources: split name to records (`__len__` and `__getitem__`), checked as they are written.
      settings: JSON values that determine the records; stored in the data set's metadata.
      max_subjects: largest number of subjects of a record.

    Returns:
      The directory, for `open_source`.

    Raises:
      UserError: a record fails its check, or the directory cannot be written.
    """
    from focusdpo_jax.data import (
        preference_pairs,  # TFDS takes most of a second to import.
    )

    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    config = f"{name}-{fingerprint}"
    data_dir = epath.Path(data_dir)
    path = data_dir / "preference_pairs" / config / preference_pairs.VERSION
    if (path / "dataset_info.json").exists():
        return path
    start, total = time.monotonic(), sum(map(len, sources.values()))
    logging.info("Building %s: %d records.", path, total)
    others = set(path.parent.glob("incomplete*"))  # Of other processes.
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _quiet(), tempfile.TemporaryDirectory() as downloads:
            builder = preference_pairs.PreferencePairs(
                sources=sources,
                settings=settings,
                max_subjects=max_subjects,
                data_dir=data_dir,
                config=preference_pairs.config(config, settings),
            )
            builder.download_and_prepare(download_dir=downloads)  # Stays empty.
    except Exception as error:  # ArrayRecord raises its own exception types.
        # TFDS does not remove its temporary directories after a failure.
        for unfinished in set(path.parent.glob("incomplete*")) - others:
            unfinished.rmtree(missing_ok=True)
        if (path / "dataset_info.json").exists():
            logging.info("another process has built %s in the meantime", path)
            return path
        reason = no_room(error)
        if reason is None and not isinstance(error, OSError):
            raise
        cure = (
            "make room and run the same command again"
            if reason
            else "choose a directory that can be written"
        )
        raise UserError(
            f"cannot write the data set to {data_dir} ({reason or error}); {cure}"
        ) from error
    logging.info("Built %d records in %.1f s.", total, time.monotonic() - start)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses TFDS's messages and progress bars, which refer to downloads that do not happen."""
    import tensorflow_datasets as tfds

    def passes(record):
        return record.levelno >= python_logging.ERROR or record.pathname.startswith(_PACKAGE)

    tfds.disable_progress_bar()
    logger = logging.get_absl_logger()
    logger.addFilter(passes)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(passes)
        tfds.enable_progress_bar()


class StoredSource:
    """Random access to the records of one split of a built data set, through TFDS.

    Attributes:
      splits: names of all splits of the data set.
      settings: the settings that it was built with.
    """

    def __init__(self, path: epath.PathLike, split: str):
        """Opens a split of a directory that `build` returned.

        Raises:
          UserError: there is no data set, or no such split.
        """
        import tensorflow_datasets as tfds

        from focusdpo_jax.data import preference_pairs

        self._path, self._split = epath.Path(path), split
        if not (self._path / "dataset_info.json").exists():
            raise UserError(f"no data set at {path}; build it first, or correct data.path")
        with _quiet():
            builder = tfds.builder_from_directory(self._path)
        if split not in builder.info.splits:
            raise UserError(
                f"{path} has no split {split!r}; it has {', '.join(builder.info.splits)}"
            )
        self.splits = tuple(builder.info.splits)
        self._source = builder.as_data_source(
            split, decoders=preference_pairs.decoders(builder.info.features)
        )
        self.settings = dict(builder.info.metadata or {})

    def __reduce__(self) -> tuple[type["StoredSource"], tuple[epath.Path, str]]:
        return StoredSource, (self._path, self._split)  # Worker processes reopen it.

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        """Reads one record.

        Raises:
          UserError: the record is corrupt; the message has its file and index.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return _record(self._source[int(index)])
        except Exception as error:  # ArrayRecord, protobuf and OpenCV each raise their own.
            pattern = f"{self._path}/*-{self._split}.array_record*"
            raise UserError(
                f"record {index} of {pattern} is corrupt ({type(error).__name__}); "
                "delete the directory and build it again"
            ) from error

    def texts(self, seconds: float = 10) -> list[tuple[str, list[str]]]:
        """Reads captions and the phrases of their subjects, for at most `seconds`.

        Images are not decoded. The list ends at the first damaged record; `__getitem__` reports it.

        Returns:
          A list of (caption, phrases), in the order of the records.
        """
        import tensorflow_datasets as tfds

        from focusdpo_jax.data import preference_pairs

        with _quiet():
            builder = tfds.builder_from_directory(self._path)
            source = builder.as_data_source(
                self._split, decoders=preference_pairs.skipping_images(builder.info.features)
            )
        found, end = [], time.monotonic() + seconds
        try:
            for index in range(len(self)):
                record = source[index]
                found.append(
                    (
                        record["caption"].decode(),
                        [phrase.decode() for phrase in record["subjects"]["phrase"]],
                    )
                )
                if time.monotonic() > end:
                    break
        except Exception as error:  # As in `__getitem__`.
            logging.warning(
                "%s: record %d cannot be read (%s)", self._path, len(found), type(error).__name__
            )
        return found


def open_source(path: epath.PathLike, split: str) -> StoredSource:
    """Opens a split of a built data set; see `StoredSource`."""
    return StoredSource(path, split)


def open_prepared(path: epath.PathLike) -> dict[str, StoredSource]:
    """Opens every split of the output folder of `prepare`.

    Returns:
      {split: source}; "train" is always present.

    Raises:
      UserError: there is no complete data set.
    """
    pairs = epath.Path(path) / PAIRS
    if not (pairs / "dataset_info.json").exists():
        raise UserError(
            f"config.data.path = {str(path)!r} holds no prepared data set; make one "
            f"with python -m focusdpo_jax.prepare --manifest=... --output={path}"
        )
    train = open_source(pairs, "train")
    return {
        split: train if split == "train" else open_source(pairs, split) for split in train.splits
    }


def _record(stored: dict) -> dict:
    """Converts a record that TFDS decoded to the form of `record`: strings, and a list of subjects."""
    columns = stored["subjects"]
    count = len(columns["phrase"])
    subjects = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    for subject in subjects:
        subject["phrase"] = subject["phrase"].decode()
    return {**stored, "caption": stored["caption"].decode(), "subjects": subjects}
