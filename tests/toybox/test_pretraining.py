"""Losses that train the small generator's encoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from focusdpo_jax.data import loader
from focusdpo_jax.diffusion import samplers
from focusdpo_jax.models.conditioned_denoiser import conditioned_denoiser
from focusdpo_jax.toybox import pretraining
from focusdpo_jax.training import loop, models, run_data


def test_crops_are_centred_on_the_mask():
    rows, columns = jnp.meshgrid(jnp.arange(64), jnp.arange(64), indexing="ij")
    images = jnp.stack([rows, columns, rows * 0], axis=-1)[None]
    mask = jnp.zeros((1, 64, 64), bool).at[0, 30:35, 28:31].set(True)
    middles = []
    for seed in range(20):
        (crop,) = pretraining.crops_around(images, mask, jax.random.key(seed), 16)
        assert crop.shape == (16, 16, 3)
        np.testing.assert_array_equal(np.diff(crop[:, 0, 0]), 1)
        middles.append(crop[..., :2].mean((0, 1)))
    # The mask's middle is (32, 29); the middles are drawn around it with a deviation of 2.
    assert np.abs(np.mean(middles, 0) - (32, 29)).max() < 1.5
    assert 1 < np.std(middles) < 4


def test_crops_stay_inside_the_image():
    images = jnp.arange(64 * 64 * 3).reshape(1, 64, 64, 3)
    mask = jnp.zeros((1, 64, 64), bool).at[0, 0, 63].set(True)
    (crop,) = pretraining.crops_around(images, mask, jax.random.key(0), 32)
    assert crop[0, -1, 2] <= images[0, 8, 63, 2] and crop.shape == (32, 32, 3)


@pytest.mark.parametrize(
    "objective, part",
    [
        ("autoencode", "vae"),
        ("attributes", "image_encoder"),
        ("probe", "probe"),
        ("generated_probe", "probe"),
    ],
)
def test_stage_changes_its_part_alone(objective, part, tiny_config, tiny_folder, tmp_path):
    config = tiny_config(objective=objective, steps=2, warmup_steps=0)
    loop.run(config, tmp_path)
    assert (tmp_path / "model" / f"{part}.safetensors").exists()
    for other in ("vae", "image_encoder", "unet"):
        before = load_file(tiny_folder / "model" / f"{other}.safetensors")
        after = load_file(tmp_path / "model" / f"{other}.safetensors")
        changed = any(np.any(before[name] != after[name]) for name in before)
        assert changed == (other == part), other


def test_regeneration_is_the_end_of_a_guided_ddim_run(tiny_config, monkeypatch):
    config = tiny_config()
    model = models.load_model(config)
    generator, parameters, empty = model.generator, model.parameters, model.tokenizer("")
    transform = loader.pair_transform(tokenize=model.tokenizer, num_subjects=3)
    records = run_data.open_data(config)["train"]
    (batch,) = loader.evaluation_batches(
        [records[i] for i in range(2)], transform=transform, batch_size=2
    )
    # Of five steps with trailing spacing, the last four are at these timesteps.
    monkeypatch.setattr(pretraining, "REGENERATED_TIMESTEPS", (799, 800))
    monkeypatch.setattr(pretraining, "_REGENERATION_GUIDANCE", (3.0, 3.0))
    key = jax.random.key(1)
    images = jax.jit(
        lambda parameters, batch: pretraining.regenerate(generator, parameters, batch, empty, key)
    )(parameters, batch)

    @jax.jit
    def sample(parameters, batch):
        clean, _ = generator.encode_latents(parameters, batch.chosen / 255)
        denoise = conditioned_denoiser(
            generator,
            parameters,
            batch.token_ids,
            batch.time_ids,
            generator.encode_reference(parameters, batch.references / 255),
            batch.present,
            negative_token_ids=empty,
        )
        latents = samplers.sample(
            samplers.classifier_free_guidance(denoise, 3.0),
            generator.schedule,
            jax.random.normal(jax.random.split(key, 3)[2], clean.shape),
            5,
            "trailing",
            known=samplers.Known(latents=clean, strength=0.8),
        )
        return generator.decode_latents(parameters, latents)

    expected = np.clip(sample(parameters, batch), 0, 1)
    assert images.shape == batch.chosen.shape and np.std(expected) > 0.01
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert np.abs(expected - batch.chosen / 255).mean() > 0.02
