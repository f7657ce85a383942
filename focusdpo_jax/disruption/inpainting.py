"""Inpaints a region of an image: mask-blended denoising, or an inpainting UNet."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from focusdpo_jax.array_types import Mask, RGBImage
from focusdpo_jax.data import geometry
from focusdpo_jax.diffusion import samplers
from focusdpo_jax.errors import UserError
from focusdpo_jax.inference.generate import scene_noise, step_keys
from focusdpo_jax.inference.sampler import SamplingModel
from focusdpo_jax.models.conditioned_denoiser import conditioned_denoiser
from focusdpo_jax.models.generator import Generator
from focusdpo_jax.sharding.mesh import inference_mesh, replicate, shard_batch

CONTEXT = 2
"""Smallest side of the square that is given to the generator, in lengths of the mask."""

# Timesteps of the phrase score, as fractions of the noise schedule: those at which subjects form.
_FIT_RANGE, _FIT_STEPS = (0.5, 0.8), 6


def is_inpainting_unet(generator: Generator) -> bool:
    """Returns whether the UNet is an inpainting one, with mask and masked image as further inputs.

    Raises:
      UserError: its number of input channels fits neither kind.
    """
    channels, read = generator.config.vae.latent_channels, generator.config.unet.in_channels
    if read not in (channels, 2 * channels + 1):
        raise UserError(
            f"the UNet reads {read} channels; disruption needs one that reads the "
            f"{channels} of the latents, or {2 * channels + 1} with mask and masked "
            "image"
        )
    return read != channels


def latent_mask(mask: Bool[Array, "H W"] | Mask, factor: int) -> Float[Array, "1 h w 1"]:
    """Returns the latents to inpaint: those with at least one masked pixel.

    Args:
      mask: bool [H, W].
      factor: pixels per latent in each direction.

    Returns:
      float32 [1, H / factor, W / factor, 1], 0 or 1.
    """
    height, width = mask.shape
    cells = mask.reshape(height // factor, factor, width // factor, factor)
    return jnp.asarray(cells.any((1, 3)), jnp.float32)[None, :, :, None]


def make_inpaint(
    generator: Generator,
    *,
    steps: int,
    strength: float,
    guidance: float,
    negative_token_ids: Int[Any, "2 L"],
    sampler: str = "ddim",
    image_scale: float = 1.0,
) -> Callable[..., UInt8[Array, "K H W 3"]]:
    """Builds the jitted function that inpaints several candidates for one region.

    With a UNet whose only input is the latents, those outside the mask are restored after every
    step (`samplers.Known`). An inpainting UNet takes, concatenated to the latents, the mask and the
    latents of the image with grey masked pixels; nothing is restored.

    Args:
      generator: the model's pure functions.
      steps, guidance, negative_token_ids, sampler, image_scale: see `generate.make_generate`.
      strength: in (0, 1], the fraction of the steps that is run: 1 keeps nothing of the original.

    Returns:
      inpaint(parameters, image, mask, token_ids, time_ids, reference, present, noise, keys) ->
      uint8 [K, H, W, 3], K candidates, valid inside the mask only. The arguments image uint8 [H, W,
      3], mask bool [H, W], token_ids [2, L], time_ids [6], reference (float [R, R, 3] in [0, 1], of
      the image encoder's size) and present (bool, whether the reference is used) are shared by all
      candidates; noise is [K, h, w, C], keys [K].

    Raises:
      UserError: the sampler does not exist, no step would be run, or the UNet is of another kind.
    """
    reads_mask, spacing = is_inpainting_unet(generator), generator.config.spacing
    guided = samplers.guides(guidance)
    # Tracing checks this too; the check here raises the error before the first call.
    samplers.sampling_timesteps(generator.schedule.timesteps, steps, spacing, sampler)
    samplers.first_step(steps, strength)

    @jax.jit
    def inpaint(parameters, image, mask, token_ids, time_ids, reference, present, noise, keys):
        pixels = image[None].astype(jnp.float32) / 255
        inpainted = latent_mask(mask, generator.latent_factor)
        clean, _ = generator.encode_latents(parameters, pixels)

        def for_all(x):
            return jnp.broadcast_to(x, (len(noise), *x.shape[1:]))

        inpainting = None
        if reads_mask:
            inpainting = for_all(
                _inpainting_channels(generator, parameters, pixels, mask, inpainted)
            )
        view = generator.encode_reference(parameters, reference[None, None])
        denoise = conditioned_denoiser(
            generator,
            parameters,
            for_all(token_ids[None]),
            for_all(time_ids[None]),
            jax.tree.map(for_all, view),
            for_all(jnp.reshape(present, (1, 1))),
            negative_token_ids=negative_token_ids if guided else None,
            image_scale=image_scale,
            inpainting=inpainting,
        )
        if guided:
            denoise = samplers.classifier_free_guidance(denoise, guidance)
        latents = samplers.sample(
            denoise,
            generator.schedule,
            noise,
            steps,
            spacing,
            sampler=sampler,
            keys=keys,
            known=samplers.Known(
                latents=clean, kept=None if reads_mask else 1 - inpainted, strength=strength
            ),
        )
        pixels = jnp.clip(generator.decode_latents(parameters, latents), 0, 1)
        return jnp.round(pixels * 255).astype(jnp.uint8)

    return inpaint


def _inpainting_channels(
    generator: Generator,
    parameters: Any,
    pixels: Float[Array, "1 H W 3"],
    mask: Bool[Array, "H W"],
    inpainted: Float[Array, "1 h w 1"],
) -> Float[Array, "1 h w channels"]:
    """Returns the inputs of an inpainting UNet besides the latents: [1, h, w, 1 + C]."""
    rest, _ = generator.encode_latents(parameters, jnp.where(mask[None, :, :, None], 0.5, pixels))
    return jnp.concatenate([inpainted, rest], axis=-1)


def make_phrase_score(
    generator: Generator, negative_token_ids: Int[Any, "2 L"]
) -> Callable[..., Float[Array, " K"]]:
    """Builds the jitted function that scores how well a phrase explains the inpainted region.

    The score is that of diffusion classifiers (Li et al. 2023, arXiv 2303.16203): the decrease of
    the denoising error inside the mask due to the phrase, here relative to the empty prompt,
    averaged over a few timesteps of the noisier half. Timesteps and noise are the same for all
    images.

    Args:
      generator: the model's pure functions.
      negative_token_ids: int [2, L], the empty prompt.

    Returns:
      score(parameters, images, mask, token_ids, time_ids) -> float32 [K], higher is better, for
      images uint8 [K, H, W, 3] and the other arguments as in `make_inpaint`.
    """
    reads_mask, schedule = is_inpainting_unet(generator), generator.schedule
    timesteps = np.linspace(*_FIT_RANGE, _FIT_STEPS) * schedule.timesteps
    size = generator.config.image_encoder.image_size

    @jax.jit
    def fit(parameters, images, mask, token_ids, time_ids):
        pixels = images.astype(jnp.float32) / 255
        count, inpainted = len(pixels), latent_mask(mask, generator.latent_factor)
        clean, _ = generator.encode_latents(parameters, pixels)

        def for_all(x):
            return jnp.broadcast_to(x, (count, *x.shape[1:]))

        inpainting = None
        if reads_mask:
            inpainting = for_all(
                _inpainting_channels(generator, parameters, pixels[:1], mask, inpainted)
            )
        empty_reference = generator.encode_reference(parameters, jnp.ones((1, 1, size, size, 3)))
        denoise = conditioned_denoiser(
            generator,
            parameters,
            for_all(token_ids[None]),
            for_all(time_ids[None]),
            jax.tree.map(for_all, empty_reference),
            jnp.zeros((count, 1), bool),
            negative_token_ids=negative_token_ids,
            inpainting=inpainting,
        )

        def gain(at):
            number, timestep = at
            noise = for_all(
                jax.random.normal(
                    jax.random.fold_in(jax.random.key(0), number), (1, *clean.shape[1:])
                )
            )
            t = jnp.full((count,), timestep)
            noisy, target = schedule.add_noise(clean, noise, t), schedule.target(clean, noise, t)
            predicted = denoise(jnp.concatenate([noisy, noisy]), jnp.concatenate([t, t]))
            error = jnp.square(predicted - jnp.concatenate([target, target]))
            error = (error.mean(-1, keepdims=True) * inpainted).sum((1, 2, 3)) / inpainted.sum()
            return error[count:] - error[:count]

        at = jnp.arange(_FIT_STEPS), jnp.asarray(timesteps, jnp.int32)
        return jax.lax.map(gain, at).mean(0)

    return fit


class Inpainter:
    """Inpaints candidates for a region of an image in batches, sharded over devices if possible."""

    def __init__(
        self,
        model: SamplingModel,
        *,
        resolution: int,
        steps: int,
        strength: float,
        guidance: float,
        sampler: str = "ddim",
        batch_size: int = 8,
    ):
        """Builds the jitted functions.

        Args:
          model: the model that generates the candidates.
          resolution: side in pixels of the squares that are generated.
          steps, strength, guidance, sampler: see `make_inpaint`.
          batch_size: candidates at once.

        Raises:
          UserError: see `make_inpaint`, or the generator does not support the resolution.
        """
        model.generator.config.check_resolution(resolution, "--resolution=")
        self._generator, self._tokenizer = model.generator, model.tokenizer
        self._resolution, self._batch_size = resolution, batch_size
        self._mesh = inference_mesh(batch_size)
        self._parameters = replicate(model.parameters, self._mesh)
        empty_prompt = model.tokenizer("")
        self._inpaint = make_inpaint(
            model.generator,
            steps=steps,
            strength=strength,
            guidance=guidance,
            sampler=sampler,
            negative_token_ids=empty_prompt,
        )
        self._phrase_score = make_phrase_score(model.generator, empty_prompt)

    def draw(
        self,
        image: RGBImage,
        mask: Mask,
        phrase: str,
        seeds: Sequence[int],
        reference: RGBImage | None = None,
    ) -> tuple[list[RGBImage], Float[np.ndarray, " K"]]:
        """Inpaints candidates inside a mask.

        The generator's input is a square around the mask, of its own resolution or, for larger
        subjects, of `CONTEXT` times the mask's length, at most the image's shorter side. Pixels are
        resampled only in the second case. Every candidate depends on its own seed and not on the
        others of its batch.

        Args:
          image: uint8 [H, W, 3].
          mask: bool [H, W], not empty and not longer than the image's shorter side.
          phrase: phrase of the new subject.
          seeds: seed of each candidate.
          reference: uint8 [h, w, 3], image of the new subject; None uses only the phrase.

        Returns:
          A list of uint8 [H, W, 3], the image with each candidate, unchanged outside the mask; and
          the phrase score of each (`make_phrase_score`), float32 [K].
        """
        side = self._resolution
        extent = max(high - low for low, high in geometry.bounds(mask))
        square = geometry.square_around(mask, min(max(side, CONTEXT * extent), *image.shape[:2]))
        small, inside = (geometry.pad_to_square(x[square], side) for x in (image, mask))
        if not inside.any():  # Thinner than a pixel of the generator's input.
            length = len(mask[square])
            rows, columns = np.nonzero(mask[square])
            inside[rows * side // length, columns * side // length] = True
        size = self._generator.config.image_encoder.image_size
        shown = (
            np.full((size, size, 3), 255, np.uint8)
            if reference is None
            else geometry.pad_to_square(reference, size)
        )
        shared = replicate(
            (
                small,
                inside,
                self._tokenizer(phrase),
                np.array([side, side, 0, 0, side, side], np.float32),
            ),
            self._mesh,
        )
        shown = replicate((np.float32(shown) / 255, np.array(reference is not None)), self._mesh)
        images, phrase_scores = [], []
        for start in range(0, len(seeds), self._batch_size):
            batch = list(seeds[start : start + self._batch_size])
            # Padded to the batch size, so that only one program is compiled.
            padded = batch + batch[-1:] * (self._batch_size - len(batch))
            noise = jnp.concatenate(
                [scene_noise(seed, [0], self._generator.latent_shape(side)) for seed in padded]
            )
            keys = step_keys(padded)
            candidates = np.asarray(
                self._inpaint(
                    self._parameters, *shared, *shown, *shard_batch((noise, keys), self._mesh)
                )
            )
            blended = np.where(inside[..., None], candidates, small)
            phrase_scores.append(
                np.asarray(
                    self._phrase_score(
                        self._parameters, shard_batch(blended, self._mesh), *shared[1:]
                    )
                )[: len(batch)]
            )
            for candidate in candidates[: len(batch)]:
                result = image.copy()
                part = result[square]  # A view: assignments change `result`.
                part[mask[square]] = geometry.pad_to_square(candidate, len(part))[mask[square]]
                images.append(result)
        return images, np.concatenate(phrase_scores)
