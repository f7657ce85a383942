"""Builds a data set from a manifest: checks lines in parallel, then writes records with TFDS.

The output folder has `pairs/` (the data set), `report.json` and `contact_sheet.png`. During the
build it also has `.work/`, with the converted lines. The report with status "complete" is written
last. An interrupted build can be repeated: valid intermediate results are reused, others are
removed, and the result is the same to the byte.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath
from tqdm import tqdm

from focusdpo_jax import interrupts
from focusdpo_jax.data import dataset, line_store, manifest
from focusdpo_jax.data.dataset import PAIRS
from focusdpo_jax.data.line_record import ImageSizes
from focusdpo_jax.data.record import Source
from focusdpo_jax.data.report import refused_lines_message, summarize
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import remove_unfinished, replace_file

REFERENCE_SIZE = 518
"""Largest side of a stored reference; no published image encoder has a larger input."""

REPORT, SHEET = "report.json", "contact_sheet.png"
_SHEET_ROWS = 12
_IN_FLIGHT = 4  # Jobs queued for each worker.


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that determine a data set besides the manifest and its images.

    Attributes:
      resolution: side of the square images, in pixels.
      max_subjects: largest number of subjects of a line.
      validation, test: fractions of the groups that go to these splits.

    Raises:
      UserError: a value is out of its range.
    """

    resolution: int = 512
    max_subjects: int = 3
    validation: float = 0.05
    test: float = 0.05

    def __post_init__(self):
        if self.resolution < 8:
            raise UserError(f"--resolution={self.resolution}: give a side in pixels, 8 or more")
        if self.resolution % 4:
            nearest = max(8, round(self.resolution / 8) * 8)
            raise UserError(
                f"--resolution={self.resolution}: no model generates squares of that side; give a "
                f"multiple of 8, such as {nearest} (Toybox's model also takes multiples of 4)"
            )
        if self.max_subjects < 1:
            raise UserError(f"--max_subjects={self.max_subjects}: give 1 or more")
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}={getattr(self, name)}: give a share from 0 to 1")
        if self.validation + self.test >= 1:
            raise UserError(
                f"--validation={self.validation} --test={self.test}: nothing is left "
                "to train on; make their sum less than 1"
            )

    @property
    def sizes(self) -> ImageSizes:
        """Returns the sides of the stored images."""
        return ImageSizes(self.resolution, min(self.resolution, REFERENCE_SIZE))


def prepare(
    path: epath.PathLike,
    output: epath.PathLike,
    settings: Settings,
    *,
    draw_sheet: Callable[[epath.Path, list[dict]], None],
    skip: bool = False,
    workers: int = 1,
    count_tokens: Callable[[str], int] | None = None,
) -> dict:
    """Builds the data set of a manifest, or verifies the one that exists.

    Args:
      path: the manifest.
      output: folder of the data set; made if missing.
      settings: settings of the result.
      draw_sheet: writes an image of some records to a path.
      skip: leave out lines that cannot be used; otherwise one of them stops the build.
      workers: number of processes; 1 works in this process.
      count_tokens: number of tokens of a caption, by the tokenizer of the model to train.

    Returns:
      The report, as JSON values; see `report`.

    Raises:
      UserError: lines were refused, no line is left, or `output` has another data set.
    """
    path, output = epath.Path(path), epath.Path(output)
    work = output / ".work"
    jobs = _LineJobs(path, settings, count_tokens)
    total = sum(1 for _ in manifest.read_lines(path))
    if not total:
        raise UserError(
            f"--manifest={path} is empty; write one JSON object per line (docs/data.md)"
        )
    try:
        if (output / PAIRS).exists():
            if _read_report(output).get("status") == "complete":
                if work.exists():  # The earlier run was interrupted before its last clean-up.
                    work.rmtree()
                return _finished(output, jobs, total, workers)
            if not work.exists():
                raise UserError(
                    f"--output={output} has a folder {PAIRS} that `prepare` did not "
                    "make; give another --output"
                )
        work.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output)
        outcomes = list(_run(jobs(work / "lines"), total, workers))
        report = summarize(outcomes, jobs.identity(outcomes))
        refused = report["refused"]
        if len(refused) == total or refused and not skip:
            work.rmtree()
            _write_report(output, report | {"status": "refused"})
            raise UserError(refused_lines_message(refused, total, output / REPORT, skip))
        _build(output, work, outcomes, report, settings, draw_sheet)
        _write_report(output, report | {"status": "complete"})
        work.rmtree()
    except OSError as error:
        raise UserError(
            f"--output={output} cannot be written ({error.strerror or error}); give a "
            "folder with room that you may write"
        ) from error
    return report | {"status": "complete"}


class _LineJobs:
    """The jobs of a manifest, which is read again for every pass."""

    def __init__(
        self, path: epath.Path, settings: Settings, count_tokens: Callable[[str], int] | None
    ):
        self._path, self._settings, self._count = path, settings, count_tokens

    def __call__(self, store: epath.Path | None) -> Iterator[line_store.LineJob]:
        for number, text in manifest.read_lines(self._path):
            yield line_store.LineJob(
                number=number,
                text=text,
                tokens=self._tokens(text),
                root=str(self._path.parent),
                store=str(store) if store else None,
                sizes=self._settings.sizes,
                max_subjects=self._settings.max_subjects,
            )

    def _tokens(self, text: bytes) -> int | None:
        if self._count is None:
            return None
        try:
            line = manifest.parse_line(text, max_subjects=self._settings.max_subjects)
        except manifest.LineError:
            return None  # The worker reports the error.
        return self._count(line.caption)

    def identity(self, outcomes: list[dict]) -> dict:
        """Returns the values of the report that identify the inputs: a digest and the settings."""
        digest = hashlib.sha256("".join(o["digest"] for o in outcomes).encode())
        return {"content": digest.hexdigest(), "settings": dataclasses.asdict(self._settings)}


def _run(jobs: Iterator[line_store.LineJob], total: int, workers: int) -> Iterator[dict]:
    """Yields the outcome of every job in order; shows progress."""
    with contextlib.ExitStack() as stack:
        if workers == 1:
            outcomes = map(line_store.process_line, jobs)
        else:
            outcomes = _in_processes(jobs, workers, stack)
        bar = stack.enter_context(
            tqdm(total=total, unit="line", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        )
        start = time.monotonic()
        for done, outcome in enumerate(outcomes, 1):
            bar.update()
            if bar.disable:
                left = (time.monotonic() - start) / done * (total - done)
                logging.log_every_n_seconds(
                    logging.INFO, "line %d of %d, about %.0f s left", 10, done, total, left
                )
            yield outcome


def _in_processes(
    jobs: Iterator[line_store.LineJob], workers: int, stack: contextlib.ExitStack
) -> Iterator[dict]:
    """Yields outcomes of worker processes; queues a few jobs per worker to bound memory."""
    # "spawn", since forking a process that has threads may hang.
    pool = stack.enter_context(
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), line_store.start_worker
        )
    )
    # Registered later and so run first: cancels queued jobs when this process stops.
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)

    def submit(job):
        with interrupts.children_without_sigint():  # `submit` may start a process.
            return pool.submit(line_store.process_line, job)

    futures = map(submit, jobs)
    waiting = collections.deque(itertools.islice(futures, _IN_FLIGHT * workers))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker process died, perhaps from a lack of memory; run the same command "
            "again with fewer --workers, it continues from here"
        ) from error


def _build(
    output: epath.Path,
    work: epath.Path,
    outcomes: list[dict],
    report: dict,
    settings: Settings,
    draw_sheet: Callable[[epath.Path, list[dict]], None],
) -> None:
    """Writes the data set and the contact sheet; each gets its final name when it is complete."""
    splits = assign_splits(
        {o["line"]: o["facts"]["group"] for o in outcomes if "facts" in o}, settings
    )
    report["splits"] = dict(collections.Counter(splits.values()))
    sources = {}
    for split in ("train", "validation", "test"):
        paths = [
            line_store.entry_path(work / "lines", o["digest"])
            for o in outcomes
            if splits.get(o["line"]) == split
        ]
        if paths:
            sources[split] = line_store.LineStoreSource(paths)
    for leftover in (work / "build", output / PAIRS):
        if leftover.exists():
            leftover.rmtree()
    most = max(map(int, report["subjects_per_scene"]))
    path = dataset.build(
        work / "build",
        "prepared",
        sources,
        {"resolution": settings.resolution, "subjects": most, "content": report["content"]},
        max_subjects=most,
    )
    draw_sheet(output / SHEET, _spread(dataset.open_source(path, "train")))
    path.rename(output / PAIRS)


def assign_splits(groups: dict[int, str], settings: Settings) -> dict[int, str]:
    """Assigns every line to a split by a hash of its group, so that other lines do not matter.

    If there are three groups or more, a split that would be empty gets a group of another, so that
    small data sets have validation images too.

    Args:
      groups: {line: group}.
      settings: has the fractions of the splits.

    Returns:
      {line: "train", "validation" or "test"}.
    """
    place = {
        group: int(hashlib.sha256(group.encode()).hexdigest()[:12], 16) / 16**12
        for group in groups.values()
    }
    edges = settings.validation, settings.validation + settings.test
    split = {
        group: "validation" if where < edges[0] else "test" if where < edges[1] else "train"
        for group, where in place.items()
    }
    order = sorted(place, key=lambda group: (place[group], group))
    if len(order) >= 3:
        names = [name for name in ("validation", "test") if getattr(settings, name)]
        for name in (*names, "train"):
            if name not in split.values():
                # From training, whose first group has the nearest hash, unless that would empty it.
                counts = collections.Counter(split.values())
                largest = "train" if counts["train"] > 1 else counts.most_common(1)[0][0]
                given = [group for group in order if split[group] == largest]
                split[given[0] if largest == "train" else given[-1]] = name
    elif "train" not in split.values():
        split = dict.fromkeys(split, "train")
    return {line: split[group] for line, group in groups.items()}


def _spread(source: Source) -> list[dict]:
    """Returns some records, evenly spaced over the source."""
    count = min(_SHEET_ROWS, len(source))
    return [source[i * len(source) // count] for i in range(count)]


def _finished(output: epath.Path, jobs: _LineJobs, total: int, workers: int) -> dict:
    """Compares an existing data set with the manifest and settings, and returns its report."""
    report = _read_report(output)
    logging.info("%s is complete; comparing it with the manifest and its images", output)
    identity = jobs.identity(list(_run(jobs(None), total, workers)))
    if identity == {name: report.get(name) for name in identity}:
        return report
    raise UserError(
        f"--output={output} holds another data set: its manifest, images or settings "
        "differ. Give another --output, or remove the folder"
    )


def _read_report(output: epath.Path) -> dict:
    try:
        return json.loads((output / REPORT).read_text())
    except (OSError, ValueError):
        return {}


def _write_report(output: epath.Path, report: dict) -> None:
    replace_file(output / REPORT, json.dumps(report, indent=2, sort_keys=True) + "\n")
