"""Draws prompts with a model: all of one size by one compiled program."""

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.inference.generate import make_generate, scene_noise
from focusdpo_jax.inference.prompts import load_reference, load_region_mask
from focusdpo_jax.sharding.mesh import drawing_mesh, replicate, shard_batch

_MASK_SIDE = 128  # Of the masks that say where references may be, in pixels.


class Sampler:
    """Draws images from prompts; models of one architecture share its compiled program.

    Prompts that place their references have a second one, since masks change how references are
    attended to. A batch is divided among as many devices as share it equally.
    """

    def __init__(
        self,
        model,
        *,
        resolution,
        slots,
        steps,
        guidance,
        negative="",
        image_scale=1.0,
        sampler="ddim",
        batch_size=8,
    ):
        """Builds the program.

        Args:
          model: a `training.models.Model`.
          resolution: side of the images in pixels.
          slots: the largest number of references of a prompt.
          steps, guidance, image_scale, sampler: see `make_generate`.
          negative: the negative prompt.
          batch_size: images drawn at once.
        """
        model.generator.config.check_resolution(resolution, "--resolution=")
        self._model, self._resolution, self._slots = model, resolution, slots
        self._batch_size = batch_size
        self._mesh = drawing_mesh(batch_size)
        self._view = jax.jit(model.generator.encode_reference)
        self._generate = make_generate(
            model.generator,
            steps=steps,
            guidance=guidance,
            image_scale=image_scale,
            sampler=sampler,
            negative_token_ids=model.tokenizer(negative),
        )

    def place(self, parameters):
        """Parameters on the devices, where `draw` needs them."""
        return replicate(parameters, self._mesh)

    def draw(self, prompts, parameters=None):
        """Yields one uint8 [H, W, 3] for each of `prompts`, in their order.

        Args:
          prompts: a list of `inference.prompts.Prompt`.
          parameters: other than the model's own, such as those of the base.
        """
        # Once: parameters that lie on the host would go to the device with every batch.
        parameters = self.place(self._model.parameters if parameters is None else parameters)
        references = {r for prompt in prompts for r in prompt.references}
        size = self._model.generator.config.image_encoder.image_size
        images = {path: load_reference(path, size) for path in {r.path for r in references}}
        places = {r: load_region_mask(r, _MASK_SIDE) for r in references}
        # Whether a prompt places its references decides its program, whoever is beside it.
        kinds = [any(r.has_region for r in prompt.references) for prompt in prompts]
        drawn = {}
        for first, kind in enumerate(kinds):
            if first not in drawn:
                # A batch that is not full repeats its last prompt: one shape, one program.
                rows = [i for i in range(first, len(prompts)) if kinds[i] == kind]
                rows = rows[: self._batch_size]
                filled = rows + rows[-1:] * (self._batch_size - len(rows))
                batch = self._draw_batch(
                    parameters, [prompts[i] for i in filled], images, places if kind else None
                )
                drawn |= dict(zip(rows, np.asarray(batch)))
            yield drawn.pop(first)

    def _draw_batch(self, parameters, prompts, images, places):
        generator, side = self._model.generator, self._resolution
        size = generator.config.image_encoder.image_size
        references = np.full((len(prompts), self._slots, size, size, 3), 255, np.uint8)
        present = np.zeros((len(prompts), self._slots), bool)
        scales = np.ones(present.shape, np.float32)
        masks = np.ones((*present.shape, _MASK_SIDE, _MASK_SIDE), np.float32) if places else None
        for row, prompt in enumerate(prompts):
            for slot, reference in enumerate(prompt.references):
                references[row, slot] = images[reference.path]
                present[row, slot] = True
                scales[row, slot] = reference.scale
                if places:
                    masks[row, slot] = places[reference]
        token_ids = np.stack([self._model.tokenizer(prompt.text) for prompt in prompts])
        time_ids = np.tile(np.float32([side, side, 0, 0, side, side]), (len(prompts), 1))
        noise = jnp.concatenate(
            [scene_noise(prompt.seed, [0], generator.latent_shape(side)) for prompt in prompts]
        )
        # The noise on the way must not repeat that of the start, which folds in 0.
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(
            jnp.asarray([prompt.seed for prompt in prompts])
        )
        references, *inputs = shard_batch(
            (references, token_ids, time_ids, present, noise, keys, scales, masks), self._mesh
        )
        token_ids, time_ids, present, noise, keys, scales, masks = inputs
        views = self._view(parameters, references.astype(jnp.float32) / 255)
        return self._generate(
            parameters, token_ids, time_ids, views, present, noise, keys, scales, masks
        )
