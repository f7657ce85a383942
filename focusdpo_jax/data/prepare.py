"""From a manifest to a data set: every line checked in parallel, then written through TFDS.

What `--output` holds afterwards: `pairs/` (the data set), `report.json`, `contact_sheet.png`. On
the way there is `.work/`, with the lines that are ready. The report is written last and says
"complete": whatever an interrupted start has left is used by the next one or thrown away, and the
result is the same to the byte.
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
from focusdpo_jax.data.report import refused_lines_message, summarize
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import remove_unfinished, replace_file

REFERENCE_SIZE = 518
"""Largest side of a stored reference: no published image encoder looks at more pixels."""

REPORT, SHEET = "report.json", "contact_sheet.png"
_SHEET_ROWS = 12
_IN_FLIGHT = 4  # Lines handed to each worker ahead.


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines a data set besides the manifest and its images.

    Attributes:
      resolution: side of the square images, in pixels.
      max_subjects: the most subjects that a line may have.
      validation, test: shares of the groups that go to these splits.
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
                f"--resolution={self.resolution}: no model draws squares of that side; give a "
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
        """Sides of the images that are stored."""
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
    """Makes the data set of a manifest, or finds that it is there.

    Args:
      path: the manifest.
      output: folder of the data set; made if missing.
      settings: what the result depends on.
      draw_sheet: writes an image of some records to a path.
      skip: leave out lines that cannot be used; otherwise one of them stops everything.
      workers: processes; 1 works in this one.
      count_tokens: tokens of a caption, by the tokenizer of the model to train.

    Returns:
      The report, as JSON values; see `report`.

    Raises:
      UserError: lines were refused, nothing is left, or `output` holds another data set.
    """
    path, output = epath.Path(path), epath.Path(output)
    work = output / ".work"
    jobs = _LineJobs(path, settings, count_tokens)
    total = sum(1 for _ in manifest.read_lines(path))
    if not total:
        raise UserError(f"--manifest={path} is empty; write one JSON object a line (docs/data.md)")
    try:
        if (output / PAIRS).exists():
            if _read_report(output).get("status") == "complete":
                if work.exists():  # All that an earlier start had left to do was to remove it.
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
    """The jobs of a manifest, read afresh for every pass over it."""

    def __init__(self, path, settings, count_tokens):
        self._path, self._settings, self._count = path, settings, count_tokens

    def __call__(self, store) -> Iterator[line_store.LineJob]:
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

    def _tokens(self, text):
        if self._count is None:
            return None
        try:
            line = manifest.parse_line(text, max_subjects=self._settings.max_subjects)
        except manifest.LineError:
            return None  # The worker refuses it again, and says why.
        return self._count(line.caption)

    def identity(self, outcomes) -> dict:
        """What the report and the data set keep of where they come from."""
        digest = hashlib.sha256("".join(o["digest"] for o in outcomes).encode())
        return {"content": digest.hexdigest(), "settings": dataclasses.asdict(self._settings)}


def _run(jobs, total, workers) -> Iterator[dict]:
    """The outcome of every job in order, with progress shown."""
    with contextlib.ExitStack() as stack:
        if workers == 1:
            outcomes = map(line_store.process_line, jobs)
        else:
            outcomes = _in_processes(jobs, workers, stack)
        bar = stack.enter_context(
            tqdm(total=total, unit="line", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        )
        began = time.monotonic()
        for done, outcome in enumerate(outcomes, 1):
            bar.update()
            if bar.disable:
                left = (time.monotonic() - began) / done * (total - done)
                logging.log_every_n_seconds(
                    logging.INFO, "line %d of %d, about %.0f s left", 10, done, total, left
                )
            yield outcome


def _in_processes(jobs, workers, stack):
    """Works on a few jobs a worker ahead, so that a long manifest is never in memory."""
    # Fresh interpreters: forking a process that has threads may hang.
    pool = stack.enter_context(
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), line_store.start_worker
        )
    )
    # Entered later and so left first: what waits is dropped when this process stops.
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)

    def submit(job):
        with interrupts.kept_from_children():  # It may start another one.
            return pool.submit(line_store.process_line, job)

    futures = map(submit, jobs)
    waiting = collections.deque(itertools.islice(futures, _IN_FLIGHT * workers))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker process died, perhaps for want of memory; run the same line "
            "again with fewer --workers, it goes on from here"
        ) from error


def _build(output, work, outcomes, report, settings, draw_sheet):
    """Writes the data set and the contact sheet, each under its final name when it is whole."""
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
    """Which split every line belongs to, by a hash of its group that other lines do not change.

    A split that would stay empty gets the one group that is nearest to it, where three groups or
    more are there: small sets are to have images to look at too.

    Args:
      groups: line to group.

    Returns:
      Line to "train", "validation" or "test".
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
        for name in ("validation", "test"):
            if getattr(settings, name) and name not in split.values():
                split[next(group for group in order if split[group] == "train")] = name
    if "train" not in split.values():
        split = dict.fromkeys(split, "train")
    return {line: split[group] for line, group in groups.items()}


def _spread(source):
    """Some records, from all over the source."""
    count = min(_SHEET_ROWS, len(source))
    return [source[i * len(source) // count] for i in range(count)]


def _finished(output, jobs, total, workers):
    """The report of a data set that is there, if it is the one that is asked for."""
    report = _read_report(output)
    logging.info("%s is complete; comparing it with the manifest and its images", output)
    identity = jobs.identity(list(_run(jobs(None), total, workers)))
    if identity == {name: report.get(name) for name in identity}:
        return report
    raise UserError(
        f"--output={output} holds another data set: its manifest, images or settings "
        "were others. Give another --output, or remove the folder"
    )


def _read_report(output):
    try:
        return json.loads((output / REPORT).read_text())
    except (OSError, ValueError):
        return {}


def _write_report(output, report):
    replace_file(output / REPORT, json.dumps(report, indent=2, sort_keys=True) + "\n")
