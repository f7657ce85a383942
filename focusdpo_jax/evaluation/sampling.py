"""Draws prompts with a model: all of one size by one compiled program."""

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.errors import UserError
from focusdpo_jax.evaluation.generate import make_generate, scene_noise
from focusdpo_jax.evaluation.prompts import load_reference


class Sampler:
    """Draws pictures from prompts; models of one architecture share its compiled program."""

    def __init__(self, model, *, resolution, slots, steps, guidance, negative="",
                 image_scale=1.0, sampler="ddim", batch_size=8):
        """Builds the program.

        Args:
          model: a `training.models.Model`.
          resolution: side of the pictures in pixels.
          slots: the largest number of references of a prompt.
          steps, guidance, image_scale, sampler: see `make_generate`.
          negative: the negative prompt.
          batch_size: pictures drawn at once.
        """
        factor = model.generator.latent_factor
        if resolution < factor or resolution % factor:
            raise UserError(f"--resolution={resolution}: give a positive multiple of {factor}.")
        self._model, self._resolution, self._slots = model, resolution, slots
        self._batch_size = batch_size
        self._view = jax.jit(model.generator.view)
        self._generate = make_generate(
            model.generator, steps=steps, guidance=guidance, image_scale=image_scale,
            sampler=sampler,
            negative_token_ids=model.tokenizer(negative))

    def draw(self, prompts, parameters=None):
        """Yields one uint8 [H, W, 3] for each of `prompts`, in their order.

        Args:
          prompts: a list of `evaluation.prompts.Prompt`.
          parameters: other than the model's own, such as those of the base.
        """
        # Once: parameters that lie on the host would go to the device with every batch.
        parameters = jax.device_put(self._model.parameters if parameters is None else parameters)
        pictures = {path: self._load(path)
                    for path in {r.path for prompt in prompts for r in prompt.references}}
        for start in range(0, len(prompts), self._batch_size):
            batch = prompts[start:start + self._batch_size]
            # A last batch that is not full repeats its last prompt: one shape, one program.
            filled = batch + batch[-1:] * (self._batch_size - len(batch))
            yield from np.asarray(self._draw_batch(parameters, filled, pictures))[:len(batch)]

    def _load(self, path):
        return load_reference(path, self._model.generator.config.image_encoder.image_size)

    def _draw_batch(self, parameters, prompts, pictures):
        generator, side = self._model.generator, self._resolution
        size = generator.config.image_encoder.image_size
        references = np.full((len(prompts), self._slots, size, size, 3), 255, np.uint8)
        present = np.zeros((len(prompts), self._slots), bool)
        for row, prompt in enumerate(prompts):
            for slot, reference in enumerate(prompt.references):
                references[row, slot] = pictures[reference.path]
                present[row, slot] = True
        views = self._view(parameters, jnp.asarray(references, jnp.float32) / 255)
        token_ids = np.stack([self._model.tokenizer(prompt.text) for prompt in prompts])
        time_ids = np.tile(np.float32([side, side, 0, 0, side, side]), (len(prompts), 1))
        noise = jnp.concatenate([
            scene_noise(prompt.seed, [0], generator.latent_shape(side)) for prompt in prompts])
        # The noise on the way must not repeat that of the start, which folds in 0.
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(
            jnp.asarray([prompt.seed for prompt in prompts]))
        return self._generate(parameters, token_ids, time_ids, views, present, noise, keys)
