"""Generates images for lists of prompts, which share one compiled program."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from focusdpo_jax.array_types import RGBImage
from focusdpo_jax.inference.generate import make_generate, scene_noise, step_keys
from focusdpo_jax.inference.prompts import Prompt, Reference, load_reference, load_region_mask
from focusdpo_jax.models.generator import Generator
from focusdpo_jax.models.tokenizer import Tokenizer
from focusdpo_jax.sharding.mesh import inference_mesh, replicate, shard_batch

_MASK_SIDE = 128  # Side of the region masks of references, in pixels.


class SamplingModel(Protocol):
    """The interface of a model that sampling requires; `training.models.Model` implements it."""

    @property
    def generator(self) -> Generator:
        """The model's pure functions."""
        ...

    @property
    def parameters(self) -> Any:
        """Parameters of the generator."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Maps a text to token ids, int32 [text encoders, length]."""
        ...


class Sampler:
    """Generates images from prompts; models of one architecture share its compiled program.

    Prompts with regions for their references use a second program, since masks change the attention
    over references. A batch is divided among the devices that divide it evenly.
    """

    def __init__(
        self,
        model: SamplingModel,
        *,
        resolution: int,
        slots: int,
        steps: int,
        guidance: float,
        negative: str = "",
        image_scale: float = 1.0,
        sampler: str = "ddim",
        batch_size: int = 8,
    ):
        """Builds the jitted functions.

        Args:
          model: the model to sample from.
          resolution: side of the images in pixels.
          slots: largest number of references of a prompt.
          steps, guidance, image_scale, sampler: see `make_generate`.
          negative: the negative prompt.
          batch_size: images of a batch.

        Raises:
          UserError: the model does not support the resolution, or see `make_generate`.
        """
        model.generator.config.check_resolution(resolution, "--resolution=")
        self._model, self._resolution, self._slots = model, resolution, slots
        self._batch_size = batch_size
        self._mesh = inference_mesh(batch_size)
        self._encode_reference = jax.jit(model.generator.encode_reference)
        self._generate = make_generate(
            model.generator,
            steps=steps,
            guidance=guidance,
            image_scale=image_scale,
            sampler=sampler,
            negative_token_ids=model.tokenizer(negative),
        )

    def replicate(self, parameters: Any) -> Any:
        """Replicates parameters on the devices, for `draw`."""
        return replicate(parameters, self._mesh)

    def draw(self, prompts: Sequence[Prompt], parameters: Any = None) -> Iterator[RGBImage]:
        """Generates an image for each prompt; yields uint8 [H, W, 3] in the order of the prompts.

        Args:
          prompts: the prompts.
          parameters: parameters instead of the model's own, such as those of the base.
        """
        # Transferred once; parameters on the host would be transferred with every batch.
        parameters = self.replicate(self._model.parameters if parameters is None else parameters)
        references = {r for prompt in prompts for r in prompt.references}
        size = self._model.generator.config.image_encoder.image_size
        images = {path: load_reference(path, size) for path in {r.path for r in references}}
        regions = {r: load_region_mask(r, _MASK_SIDE) for r in references}
        # A prompt with regions always uses the program with masks, so that its image does not
        # depend on the other prompts of the batch.
        kinds = [any(r.has_region for r in prompt.references) for prompt in prompts]
        generated = {}
        for first, kind in enumerate(kinds):
            if first not in generated:
                # Padded with the last prompt to the batch size, so that only one program is
                # compiled.
                rows = [i for i in range(first, len(prompts)) if kinds[i] == kind]
                rows = rows[: self._batch_size]
                padded = rows + rows[-1:] * (self._batch_size - len(rows))
                batch = self._generate_batch(
                    parameters, [prompts[i] for i in padded], images, regions if kind else None
                )
                generated |= dict(zip(rows, np.asarray(batch)))
            yield generated.pop(first)

    def _generate_batch(
        self,
        parameters: Any,
        prompts: Sequence[Prompt],
        images: Mapping[str, RGBImage],
        regions: Mapping[Reference, np.ndarray] | None,
    ) -> UInt8[Array, "B H W 3"]:
        generator, side = self._model.generator, self._resolution
        size = generator.config.image_encoder.image_size
        references = np.full((len(prompts), self._slots, size, size, 3), 255, np.uint8)
        present = np.zeros((len(prompts), self._slots), bool)
        scales = np.ones(present.shape, np.float32)
        masks = None
        if regions is not None:
            masks = np.ones((*present.shape, _MASK_SIDE, _MASK_SIDE), np.float32)
        for row, prompt in enumerate(prompts):
            for slot, reference in enumerate(prompt.references):
                references[row, slot] = images[reference.path]
                present[row, slot] = True
                scales[row, slot] = reference.scale
                if regions is not None and masks is not None:
                    masks[row, slot] = regions[reference]
        token_ids = np.stack([self._model.tokenizer(prompt.text) for prompt in prompts])
        time_ids = np.tile(np.array([side, side, 0, 0, side, side], np.float32), (len(prompts), 1))
        noise = jnp.concatenate(
            [scene_noise(prompt.seed, [0], generator.latent_shape(side)) for prompt in prompts]
        )
        keys = step_keys([prompt.seed for prompt in prompts])
        references, *inputs = shard_batch(
            (references, token_ids, time_ids, present, noise, keys, scales, masks), self._mesh
        )
        token_ids, time_ids, present, noise, keys, scales, masks = inputs
        encoded = self._encode_reference(parameters, references.astype(jnp.float32) / 255)
        return self._generate(
            parameters, token_ids, time_ids, encoded, present, noise, keys, scales, masks
        )
