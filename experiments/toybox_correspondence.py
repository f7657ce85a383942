r"""Precision of SPAF's match on Toybox, by source of similarity and timestep bucket.

    python -m experiments.toybox_correspondence --model=toybox

Toybox provides the exact masks of all subjects. On validation scenes of the default configuration,
for each replaced subject and each bucket, the script measures the share of the matched locations of
the chosen image on that subject (`inside`), its value for locations drawn at random (`chance`), and
the matched area over the subject's (`area`). It also measures `alignment` in the chosen image and
in the rejected one, in which another individual replaces the subject.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import benchmark_cases
from focusdpo_jax.data import loader
from focusdpo_jax.focus import correspondence
from focusdpo_jax.focus.grids import average_to_grid
from focusdpo_jax.models.generator import split_parameters
from focusdpo_jax.training import assembly, generator_step, models, run_data


def measure(config: Any, model: Any, batches):
    """Yields (bucket, inside, chance, area, alignment of chosen, alignment of rejected)."""
    buckets = assembly.focus_buckets(config)
    source, encode = assembly.make_encoder(model.generator, config, buckets)
    objective = generator_step.GeneratorStep(model.generator, config, model.tokenizer(""), source)
    trainable, frozen = split_parameters(model.parameters, config.trainable)
    fixed = {"parameters": frozen, "reference": trainable}
    focus_maps = jax.jit(objective.focus_maps, static_argnums=0)
    batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    encoded = [encode(model.parameters, batch) for batch in batches]
    for name, (structure, params) in buckets.items():
        inside, chance, areas, alignment = [], [], [], []
        for index, (batch, pairs) in enumerate(zip(batches, encoded)):
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            match = focus_maps(structure, fixed, pairs, params, key).match
            replaced = (batch.masks & batch.prior_mask[:, None]).astype(jnp.float32)
            coverage = average_to_grid(replaced, match.union.shape[1:])
            matched = match.subjects[::2]  # Chosen images only.
            area, overlap = (np.asarray(x.sum((2, 3))) for x in (matched, matched * coverage))
            inside.append(overlap[area > 0] / area[area > 0])
            chance.append(np.asarray(coverage.mean((2, 3)))[area > 0])
            areas.append(area[area > 0] / np.asarray(coverage.sum((2, 3)))[area > 0])
            prior = generator_step.repeat_for_pair(pairs.prior)
            alignment.append(np.asarray(correspondence.alignment(match, prior)).reshape(-1, 2).T)
        yield (
            name,
            np.concatenate(inside).mean(),
            np.concatenate(chance).mean(),
            np.concatenate(areas).mean(),
            *np.concatenate(alignment, axis=1).mean(1),
        )


def main() -> None:
    """Prints one line per source and bucket."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--model", default="toybox-leaky", help="config.model.pretrained")
    arguments = parser.parse_args()
    config = benchmark_cases.load_config(
        "toybox_dpo",
        model__pretrained=arguments.model,
        data__train_size=1,
        data__validation_size=arguments.scenes,
        data__test_size=1,
    )
    records = run_data.open_data(config)["validation"]
    model = models.load_model(config)
    transform = loader.pair_transform(
        tokenize=model.tokenizer, num_subjects=run_data.subject_slots(config, None)
    )
    batches = list(
        loader.evaluation_batches(
            [records[i] for i in range(arguments.scenes)],
            transform=transform,
            batch_size=min(arguments.scenes, config.evaluation.batch_size),
        )
    )
    for features in ("vit", "unet", "attention"):
        # The attention map needs no prototypes: image tokens represent the subject.
        for count in arguments.prototypes if features != "attention" else [0]:
            config = benchmark_cases.changed(
                config, focus__features=features, focus__prototypes=max(1, count)
            )
            for bucket, inside, chance, area, chosen, rejected in measure(config, model, batches):
                print(
                    f"{features:10s} {count or '':2} prototypes, {bucket}: inside "
                    f"{100 * inside:5.1f} %  chance {100 * chance:4.1f} %  area {area:.2f}  "
                    f"alignment chosen {chosen:.3f} rejected {rejected:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
