"""Draws and scores the scenes of a benchmark, and sums up; each step goes on where it was stopped.

Scenes are worked on in batches whose members never change, so that an image or a score is the same
bit for bit whether or not the evaluation was interrupted. Shares of the batches can be given to
several processes that see one folder.
"""

from absl import logging

from focusdpo_jax.data.images import read_image
from focusdpo_jax.evaluation import report, summaries
from focusdpo_jax.evaluation import scenes as scene_files
from focusdpo_jax.evaluation.output_folder import ExternalImages
from focusdpo_jax.inference.sampler import Sampler
from focusdpo_jax.models import truncation
from focusdpo_jax.progress import ItemProgress
from focusdpo_jax.vision.encoders import digest_of
from focusdpo_jax.vision.regions import Region


def run(
    folder,
    benchmark,
    sides,
    sampling,
    *,
    batch_size,
    share=(0, 1),
    images=None,
    workdir=None,
    cases=6,
):
    """Draws, scores, sums up and reports.

    Args:
      folder: an `OutputFolder`.
      benchmark: one of `benchmarks`.
      sides: {"base" or "policy": function that loads a model (`training.models.Model`)}; empty
        where `images` are given. All have one architecture.
      sampling: keyword arguments of `sampling.Sampler`: resolution, steps, guidance, sampler.
      batch_size: images drawn or scored at once.
      share: (i, n), see `batches`; of a share no results are made.
      images: folder of images that another program drew, or None.
      workdir: folder of the run, for the report, or None.
      cases: best and worst scenes each in the report.

    Returns:
      The values of results.json, or None where images of other shares are still missing.
    """
    folder.claim({**benchmark.settings, "batch_size": batch_size})
    scenes = benchmark.scenes(folder)
    scene_files.write(folder.path / "scenes.jsonl", scenes)
    given, image_source = None, folder
    if images is not None:
        given = image_source = ExternalImages(images, scenes)
        folder.claim({"images": str(images), "digest of images": given.digest()})
    else:
        sampler = None
        for side, load in sides.items():
            sampler = _draw_side(folder, side, scenes, load, sampler, sampling, batch_size, share)
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
            "%d of %d scenes belong to other shares; the line without --share makes the report",
            len(missing),
            len(scenes),
        )
        return None
    return _sum_up(folder, benchmark, scenes, scores, image_source, workdir, cases)


def _draw_side(folder, side, scenes, load, sampler, sampling, batch_size, share):
    """Draws with one model and lets go of it; returns the sampler, which needs none of its own."""
    model = load()
    if sampler is None:
        sampler = Sampler(
            model.with_parameters({}),
            batch_size=batch_size,
            **sampling,
            slots=max(len(scene.subjects) for scene in scenes),
        )
        truncation.warn(model.tokenizer, scene_files.texts(scenes), "the scenes")
    # Not before the sampler is there, which refuses what cannot be.
    folder.claim({"sampling": sampling, f"{side} model": digest_of(model.parameters)})
    parameters = sampler.replicate(model.parameters)
    draw(
        folder,
        side,
        scenes,
        lambda prompts: sampler.draw(prompts, parameters),
        batch_size=batch_size,
        share=share,
    )
    return sampler


def _sum_up(folder, benchmark, scenes, scores, image_source, workdir, cases):
    """results.json and report.html."""
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


def batches(scenes, size, share=(0, 1)):
    """(number, scenes) of the batches of process i of n, `share` = (i, n)."""
    index, count = share
    for number, start in enumerate(range(0, len(scenes), size)):
        if number % count == index:
            yield number, scenes[start : start + size]


def draw(folder, side, scenes, drawer, *, batch_size, share=(0, 1)):
    """Draws every image that is missing.

    Args:
      folder: an `OutputFolder`.
      side: "base" or "policy".
      drawer: from a list of `prompts.Prompt` to an iterable of images.
      batch_size: scenes given to `drawer` at once.
      share: see `batches`.

    Returns:
      How many were drawn.
    """
    work = [
        (batch, [s for s in batch if not folder.image_path(side, s).exists()])
        for _, batch in batches(scenes, batch_size, share)
    ]
    total = sum(len(missing) for _, missing in work)
    progress = Progress(f"{side}: images drawn", total)
    for batch, missing in work:
        if missing:
            # The whole batch, so that what is missing is drawn as it would have been.
            drawn = drawer([scene.as_prompt() for scene in batch])
            for scene, image in zip(batch, drawn, strict=True):
                if scene in missing:
                    folder.save_image(side, scene, image)
            progress.add(len(missing))
    return total


def score(folder, side, scenes, scorer, *, image_source, regions, batch_size, share=(0, 1)):
    """Scores every image that has no score yet.

    Args:
      folder, side, share: as in `draw`.
      scorer: see `scoring`.
      image_source: what has the images: the folder, or an `ExternalImages`.
      regions: from a scene and its image to the regions of its subjects.
      batch_size: images at once.
    """
    known = folder.load_scores(side, scorer.name)
    work = [
        (number, batch)
        for number, batch in batches(scenes, batch_size, share)
        if not all(scene.name in known for scene in batch)
    ]
    progress = Progress(
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


def region_lookup(boxes, given=None):
    """The function of a scene and an image to the regions of its subjects.

    A mask that lies beside an image comes first, then the box that the scene asks for, then what
    was found.

    Args:
      boxes: {scene: {"boxes": a list}} as `scoring.RegionScorer` finds them; may be empty.
      given: an `ExternalImages`, or None.
    """

    def regions(scene, image):
        found = boxes.get(scene.name, {"boxes": [None] * len(scene.subjects)})["boxes"]
        masks = given.regions(scene, image) if given else [None] * len(scene.subjects)
        return [
            mask or (Region(subject.box) if subject.box else box and Region(tuple(box)))
            for mask, subject, box in zip(masks, scene.subjects, found)
        ]

    return regions
