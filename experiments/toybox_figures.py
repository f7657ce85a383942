"""Measures of Toybox's small generators, for `toybox_report`."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.data import dataset, loader
from focusdpo_jax.evaluation import toybox_results
from focusdpo_jax.evaluation.tables import aligned
from focusdpo_jax.inference.generate import make_generate, scene_noise
from focusdpo_jax.toybox import metrics as toybox_metrics
from focusdpo_jax.toybox.metrics import LOWER_IS_BETTER
from focusdpo_jax.toybox.probe import TOYBOX, Probe, read


def psnr(squared_error):
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]."""
    return float(-10 * np.log10(squared_error))


def reconstruct(generator: Any, parameters, images, batch_size: int):
    """Encodes and decodes images, uint8 [N, H, W, 3], without noise: float32 in [0, 1]."""

    @jax.jit
    def reconstruct_batch(parameters, batch):
        mean, _ = generator.encode_latents(parameters, batch.astype(jnp.float32) / 255)
        return jnp.clip(generator.decode_latents(parameters, mean), 0, 1)

    return np.concatenate(
        [
            reconstruct_batch(parameters, images[i : i + batch_size])
            for i in range(0, len(images), batch_size)
        ]
    )


def generate_images(model: Any, scenes, *, steps: int, guidance: float, seed: int, batch_size: int):
    """Generates images, uint8 [N, H, W, 3], of the N scenes of a `PreferenceBatch`."""
    generator = model.generator
    generate = make_generate(
        generator, steps=steps, guidance=guidance, negative_token_ids=model.tokenizer("")
    )
    encode_reference = jax.jit(generator.encode_reference)
    shape = generator.latent_shape(scenes.chosen.shape[1])
    generated = []
    for start in range(0, len(scenes.index), batch_size):
        rows = jax.tree.map(lambda x, s=start: x[s : s + batch_size], scenes)
        references = encode_reference(model.parameters, rows.references.astype(np.float32) / 255)
        generated.append(
            generate(
                model.parameters,
                rows.token_ids,
                rows.time_ids,
                references,
                rows.present,
                scene_noise(seed, rows.index, shape),
            )
        )
    return np.concatenate(generated)


def report(model: Any, config: Any, *, split: str, count: int, seed: int, batch_size: int, parts):
    """Measures a model.

    Args:
      model: `training.models.Model`, with a probe unless only the autoencoder is measured.
      config: RunConfig of the world and of sampling.
      split: split of the subjects.
      count: number of scenes.
      seed: of the noise and of the bootstrap.
      batch_size: number of scenes that are processed at once.
      parts: what to measure, of "autoencoder", "probe" and "generator".

    Returns:
      A tuple (figures, tables, scenes, captions, generated):
      figures: PSNR in dB, {name: value}.
      tables: {source of images: result of `toybox_results.summarize`}.
      scenes: PreferenceBatch of the `count` scenes.
      captions: caption of each scene.
      generated: generated images, uint8 [count, H, W, 3], or None.
    """
    source = dataset.ToyboxSource(dataset.toybox_world(config), split, count)
    records = [source[i] for i in range(count)]
    transform = loader.pair_transform(
        tokenize=model.tokenizer,
        num_subjects=len(config.data.subject_counts),
        reference_size=model.generator.config.image_encoder.image_size,
    )
    (scenes,) = loader.evaluation_batches(records, transform=transform, batch_size=count)
    figures, tables, generated = {}, {}, None
    predict = jax.jit(
        lambda parameters, images: read(
            cast(Any, Probe(TOYBOX).apply({"params": parameters}, images))
        )
    )

    def measure(images):
        """Estimates of all measures on images [N, H, W, 3] in [0, 1]."""
        readings = [
            predict(model.probe, images[i : i + batch_size]) for i in range(0, count, batch_size)
        ]
        readings = jax.tree.map(lambda *rows: np.concatenate(rows), *readings)
        return toybox_results.summarize(
            toybox_metrics.compute(readings, scenes.truth, scenes.present), seed=seed
        )

    chosen = scenes.chosen.astype(np.float32) / 255
    if {"autoencoder", "probe"} & set(parts):
        decoded = reconstruct(model.generator, model.parameters, scenes.chosen, batch_size)
        error = np.square(decoded - chosen).mean(-1)
        inside = scenes.masks.any(1)
        figures = {
            "psnr": psnr(error.mean()),
            "psnr_inside_subjects": psnr(error[inside].mean()),
            "psnr_background": psnr(error[~inside].mean()),
        }
    if "probe" in parts:
        tables |= {"renders": measure(chosen), "reconstructions": measure(decoded)}
    if "generator" in parts:
        generated = generate_images(
            model,
            scenes,
            steps=config.sampling.steps,
            guidance=config.sampling.guidance,
            seed=seed,
            batch_size=batch_size,
        )
        tables["generated"] = measure(generated.astype(np.float32) / 255)
    return figures, tables, scenes, [record["caption"] for record in records], generated


def found_classes(model: Any, images, batch_size: int):
    """Returns the classes that the probe finds in images, uint8 [N, H, W, 3]: bool [N, classes]."""
    predict = jax.jit(
        lambda parameters, images: (
            read(cast(Any, Probe(TOYBOX).apply({"params": parameters}, images))).area
        )
    )
    areas = [
        predict(model.probe, images[i : i + batch_size].astype(np.float32) / 255)
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate(areas) >= toybox_metrics.MIN_AREA


def class_errors(found, class_id, present):
    """Compares the classes that the probe finds with those of the references.

    Scenes with two subjects of one class are left out, as in `toybox.metrics`.

    Args:
      found: bool [N, classes], from `found_classes`.
      class_id: int [N, S], classes of the references.
      present: bool [N, S], which slots have a subject.

    Returns:
      ({number of subjects: (scenes, scenes with exactly the right classes, scenes with all of them
      and others)}, rejected): the second is bool [N], scenes whose classes are not right.
    """
    counts, rejected = {}, np.zeros(len(found), bool)
    for i, (row, ids) in enumerate(zip(found, class_id)):
        wanted = ids[present[i]]
        if len(set(wanted)) < len(wanted):
            continue
        right = np.isin(np.arange(len(row)), wanted)
        rejected[i] = (row != right).any()
        extra = rejected[i] and row[right].all()
        scenes = counts.get(len(wanted), (0, 0, 0))
        counts[len(wanted)] = tuple(np.add(scenes, (1, not rejected[i], extra)).tolist())
    return dict(sorted(counts.items())), rejected


def format_tables(tables):
    """Formats one row per measure and one column per source: mean and 95 % interval in per cent."""
    lines = [["measure", *tables]]
    for name in next(iter(tables.values()))["metrics"]:
        cells = []
        for summary in tables.values():
            estimate = summary["metrics"].get(name, {}).get("base")
            cells.append(
                "-"
                if not (estimate and estimate["n"])
                else "{:.1f} % [{:.1f}, {:.1f}]".format(
                    *(100 * estimate[key] for key in ("mean", "low", "high"))
                )
            )
        lines.append(
            [f"{name.replace('_', ' ')} {'↓' if name in LOWER_IS_BETTER else '↑'}", *cells]
        )
    return aligned(lines)
