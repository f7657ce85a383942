"""Figures of the small generators are computed over the images that their names state."""

import numpy as np
import pytest

from experiments import toybox_figures
from focusdpo_jax.data import dataset
from focusdpo_jax.toybox import pretraining
from focusdpo_jax.training import models

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tiny_folder):
    import jax
    import tiny

    model = models.load_model(tiny.tiny_config(tiny_folder))
    return type(model)(
        model.generator,
        model.parameters,
        model.tokenizer,
        pretraining.init_probe(jax.random.key(0)),
    )


def report(model, tiny_config, parts, batch_size=4):
    return toybox_figures.report(
        model,
        tiny_config(),
        split="validation",
        count=6,
        seed=0,
        batch_size=batch_size,
        parts=parts,
    )


def test_psnr_inside_subjects(model, tiny_config, monkeypatch):
    """An error of 0.1 inside all subjects and of 0.01 elsewhere is 20 dB inside and 40 dB elsewhere."""
    config = tiny_config()
    source = dataset.ToyboxSource(dataset.toybox_world(config), "validation", 6)
    inside = np.stack(
        [np.any([s["mask"] for s in source[i]["subjects"]], axis=0) for i in range(6)]
    )

    def reconstruct(generator, parameters, images, batch_size):
        return images / 255.0 + np.where(inside, 0.1, 0.01)[..., None]

    monkeypatch.setattr(toybox_figures, "reconstruct", reconstruct)
    figures, tables, *_ = report(model, tiny_config, ["autoencoder"])
    assert figures["psnr_inside_subjects"] == pytest.approx(20, abs=1e-3)
    assert figures["psnr_background"] == pytest.approx(40, abs=1e-3)
    share = inside.mean()
    assert figures["psnr"] == pytest.approx(
        -10 * np.log10(share * 0.01 + (1 - share) * 0.0001), abs=1e-3
    )
    assert not tables


def test_images_do_not_depend_on_the_batch(model, tiny_config):
    *_, scenes, captions, drawn = report(model, tiny_config, ["generator"], batch_size=2)
    *_, again = report(model, tiny_config, ["generator"], batch_size=3)
    assert drawn.shape == scenes.chosen.shape and len(captions) == 6
    assert np.abs(drawn.astype(int) - again).max() <= 1


def test_classes_of_scenes_are_counted_by_their_number_of_subjects():
    present = np.array([[1, 0], [1, 0], [1, 1], [1, 1], [1, 1]], bool)
    class_id = np.array([[2, 0], [2, 0], [0, 1], [0, 1], [1, 1]])
    found = np.array(
        [
            [0, 0, 1],  # Right.
            [1, 0, 1],  # Another class in addition.
            [1, 1, 0],  # Right.
            [1, 0, 1],  # One is missing, and another found.
            [1, 1, 1],  # Two subjects of one class: not counted.
        ],
        bool,
    )
    counts, rejected = toybox_figures.class_errors(found, class_id, present)
    assert counts == {1: (2, 1, 1), 2: (2, 1, 0)}
    assert rejected.tolist() == [False, True, False, True, False]


def test_found_classes_cover_enough_of_the_image(model, tiny_config):
    *_, scenes, _, drawn = report(model, tiny_config, ["generator"])
    found = toybox_figures.found_classes(model, drawn, 4)
    assert found.shape == (6, 8) and found.dtype == bool


def test_tables_have_a_column_for_each_source(model, tiny_config):
    _, tables, *_ = report(model, tiny_config, ["probe"])
    text = toybox_figures.format_tables(tables)
    assert text.splitlines()[0].split() == ["measure", "renders", "reconstructions"]
    missing = tables["renders"]["metrics"]["missing"]["base"]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("missing"))
    assert f"{100 * missing:.1f} %" in row
