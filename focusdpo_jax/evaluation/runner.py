"""Runs a benchmark: generates and scores images, and writes the results; each step can be resumed.

Batches always have the same members, so that an image or a score is the same bit for bit whether or
not the evaluation was interrupted. Several processes that share a folder can each work on a share
of the batches.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.data.images import read_image
from focusdpo_jax.evaluation import report, summaries
from focusdpo_jax.evaluation import scenes as scene_files
from focusdpo_jax.evaluation.benchmarks import Benchmark
from focusdpo_jax.evaluation.output_folder import ExternalImages, OutputFolder
from focusdpo_jax.evaluation.scenes import BenchmarkScene
from focusdpo_jax.evaluation.scoring import RegionScorer, Scorer
from focusdpo_jax.inference.prompts import Prompt
from focusdpo_jax.inference.sampler import Sampler
from focusdpo_jax.models import truncation
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.vision.encoders import digest_of
from focusdpo_jax.vision.regions import Region

RegionLookup = Callable[[BenchmarkScene, RGBImage], list[Region | None]]
"""Maps a scene and its image to the region of each subject."""


def run(
    folder: OutputFolder,
    benchmark: Benchmark,
    sides: Mapping[str, Callable[[], Any]],
    sampling: Mapping[str, Any] | None,
    *,
    batch_size: int,
    reference_scale: float = 1.0,
    share: tuple[int, int] = (0, 1),
    images: epath.PathLike | None = None,
    workdir: epath.Path | None = None,
    cases: int = 6,
) -> dict[str, Any] | None:
    """Generates, scores, aggregates and reports.

    Args:
      folder: the output folder.
      benchmark: the benchmark.
      sides: {"base" or "policy": function that loads a model}; empty if `images` is given. All
        models have one architecture.
      sampling: keyword arguments of `Sampler`: resolution, steps, guidance, sampler; None if
        `images` is given.
      batch_size: images generated or scored at once.
      reference_scale: weight of every reference in generated images, >= 0.
      share: (i, n), see `batches`; a single share writes no results.
      images: folder of images that another program generated, or None.
      workdir: folder of the run, for the report, or None.
      cases: number of best and of worst scenes in the report.

    Returns:
      The values of results.json, or None if images of other shares are still missing.
    """
    source = "a model" if images is None else "another program"
    folder.claim({**benchmark.settings, "batch_size": batch_size, "source of images": source})
    scenes = benchmark.scenes(folder)
    scene_files.write(folder.path / "scenes.jsonl", scenes)
    given, image_source = None, folder
    if images is not None:
        given = image_source = ExternalImages(images, scenes)
        folder.claim({"images": str(images), "digest of images": given.digest()})
    else:
        assert sampling is not None  # As `images` is.
        sampler = None
        for side, load in sides.items():
            sampler = _draw_side(
                folder, side, scenes, load, sampler, sampling, reference_scale, batch_size, share
            )
    region_scorer, scores = benchmark.region_scorer, {}
    for side in sides or ("policy",):
        how = {"image_source": image_source, "batch_size": batch_size, "share": share}
        boxes = {}
        if region_scorer:
            score(folder, side, scenes, region_scorer, regions=region_lookup({}), **how)
            boxes = folder.load_scores(side, region_scorer.name)
        regions = region_lookup(boxes, given)
        for scorer in benchmark.scorers:
            score(folder, side, scenes, scorer, regions=regions, **how)
        scores[side] = {
            scorer.name: folder.load_scores(side, scorer.name) for scorer in benchmark.scorers
        }
    missing = {name for values in scores.values() for name in summaries.unscored(scenes, values)}
    if missing:
        logging.info(
            "%d of %d scenes belong to other shares; the command without --share writes the report",
            len(missing),
            len(scenes),
        )
        return None
    return _sum_up(folder, benchmark, scenes, scores, image_source, workdir, cases)


def _draw_side(
    folder: OutputFolder,
    side: str,
    scenes: list[BenchmarkScene],
    load: Callable[[], Any],
    sampler: Sampler | None,
    sampling: Mapping[str, Any],
    reference_scale: float,
    batch_size: int,
    share: tuple[int, int],
) -> Sampler:
    """Generates with one model and releases it; returns the sampler, for the models that follow."""
    model = load()
    if sampler is None:
        sampler = Sampler(
            model.with_parameters({}),
            batch_size=batch_size,
            **sampling,
            slots=max(len(scene.subjects) for scene in scenes),
        )
        truncation.warn(model.tokenizer, scene_files.texts(scenes), "the scenes")
    # After the sampler's construction, which checks the settings. Folders of earlier versions have
    # no scale, and references of weight 1.
    claimed = {**sampling, "reference_scale": reference_scale} if reference_scale != 1 else sampling
    folder.claim({"sampling": claimed, f"{side} model": digest_of(model.parameters)})
    parameters = sampler.replicate(model.parameters)
    draw(
        folder,
        side,
        scenes,
        lambda prompts: sampler.draw([_scaled(p, reference_scale) for p in prompts], parameters),
        batch_size=batch_size,
        share=share,
    )
    return sampler


def _scaled(prompt: Prompt, scale: float) -> Prompt:
    """Returns a prompt with a weight for all its references."""
    references = tuple(dataclasses.replace(r, scale=scale) for r in prompt.references)
    return dataclasses.replace(prompt, references=references)


def _sum_up(
    folder: OutputFolder,
    benchmark: Benchmark,
    scenes: list[BenchmarkScene],
    scores: dict,
    image_source: OutputFolder | ExternalImages,
    workdir: epath.Path | None,
    cases: int,
) -> dict[str, Any]:
    """Writes results.json and report.html; returns the results."""
    values = {
        side: summaries.merge_scores(by_scorer.values()) for side, by_scorer in scores.items()
    }
    settings = folder.read("settings.json")
    results = {
        "metrics": summaries.summarize(
            {side: summaries.values_by_group(scenes, own) for side, own in values.items()},
            seed=settings["seed"],
        ),
        "settings": {
            **settings,
            "pictures": len(scenes),
            "scores": {side: sorted(by_scorer) for side, by_scorer in scores.items()},
        },
    }
    folder.write("results.json", results)
    name = workdir.name if workdir else settings.get("images", " and ".join(scores))
    report.write(
        folder.path / "report.html",
        report.Report(
            title=f"Evaluation of {name}",
            about=benchmark.about,
            results=results,
            scenes=scenes,
            scores=values,
            image_path=image_source.image_path,
            workdir=workdir,
        ),
        cases=cases,
    )
    return results


def batches(
    scenes: Sequence[BenchmarkScene], size: int, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, Sequence[BenchmarkScene]]]:
    """Yields (number, scenes) of the batches of process i of n, `share` = (i, n)."""
    index, count = share
    for number, start in enumerate(range(0, len(scenes), size)):
        if number % count == index:
            yield number, scenes[start : start + size]


def draw(
    folder: OutputFolder,
    side: str,
    scenes: Sequence[BenchmarkScene],
    drawer: Callable[[list[Prompt]], Iterable[RGBImage]],
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Generates the images that are missing.

    Args:
      folder: the output folder.
      side: "base" or "policy".
      scenes: scenes of the benchmark.
      drawer: maps a list of prompts to an iterable of generated images.
      batch_size: scenes given to `drawer` at once.
      share: see `batches`.

    Returns:
      The number of generated images.
    """
    work = [
        (batch, [s for s in batch if not folder.image_path(side, s).exists()])
        for _, batch in batches(scenes, batch_size, share)
    ]
    total = sum(len(missing) for _, missing in work)
    progress = ItemProgress(f"{side}: images generated", total)
    for batch, missing in work:
        if missing:
            # The whole batch, so that the missing images are the same as without an interruption.
            generated = drawer([scene.as_prompt() for scene in batch])
            for scene, image in zip(batch, generated, strict=True):
                if scene in missing:
                    folder.save_image(side, scene, image)
            progress.add(len(missing))
    return total


def score(
    folder: OutputFolder,
    side: str,
    scenes: Sequence[BenchmarkScene],
    scorer: Scorer | RegionScorer,
    *,
    image_source: OutputFolder | ExternalImages,
    regions: RegionLookup,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Scores the images that have no score yet.

    Args:
      folder, side, scenes, share: see `draw`.
      scorer: computes the scores.
      image_source: has the paths of the images: the folder, or an `ExternalImages`.
      regions: maps a scene and its image to the regions of its subjects.
      batch_size: images at once.
    """
    known = folder.load_scores(side, scorer.name)
    work = [
        (number, batch)
        for number, batch in batches(scenes, batch_size, share)
        if not all(scene.name in known for scene in batch)
    ]
    progress = ItemProgress(
        f"{side}: images scored by {scorer.name.rpartition('-')[0]}",
        sum(len(batch) for _, batch in work),
    )
    for number, batch in work:
        images = [read_image(image_source.image_path(side, s)) for s in batch]
        found = [regions(scene, image) for scene, image in zip(batch, images)]
        values = scorer.score(batch, images, found)
        folder.save_scores(
            side, scorer.name, number, {scene.name: value for scene, value in zip(batch, values)}
        )
        progress.add(len(batch))


def region_lookup(boxes: Mapping[str, Any], given: ExternalImages | None = None) -> RegionLookup:
    """Returns the function from a scene and its image to the regions of its subjects.

    The order of precedence is: a mask next to the image, the box that the scene requests, the box
    that was found.

    Args:
      boxes: {scene: {"boxes": a list}} as `scoring.RegionScorer` returns them; may be empty.
      given: an `ExternalImages`, or None.
    """

    def regions(scene, image):
        found = boxes.get(scene.name, {"boxes": [None] * len(scene.subjects)})["boxes"]
        masks = given.regions(scene, image) if given else [None] * len(scene.subjects)
        return [
            mask or (Region(subject.box) if subject.box else Region(tuple(box)) if box else None)
            for mask, subject, box in zip(masks, scene.subjects, found)
        ]

    return regions
