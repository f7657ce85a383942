"""A part of an image drawn anew: mask-blended denoising, or an inpainting UNet."""

import jax
import jax.numpy as jnp
import numpy as np

from focusdpo_jax.data import geometry
from focusdpo_jax.diffusion import samplers
from focusdpo_jax.errors import UserError
from focusdpo_jax.inference.generate import conditioned_denoiser, scene_noise
from focusdpo_jax.sharding.mesh import drawing_mesh, replicate, shard_batch

CONTEXT = 2
"""Side of the square that the generator sees, in lengths of the mask, unless more pixels fit."""

# Where the phrase is weighed: shares of the noise schedule, between which subjects take shape.
_FIT_RANGE, _FIT_STEPS = (0.5, 0.8), 6


def is_inpainting_unet(generator):
    """Whether the UNet is an inpainting one, which reads mask and masked image.

    Raises:
      UserError: it reads neither latents alone nor these three.
    """
    channels, read = generator.config.vae.latent_channels, generator.config.unet.in_channels
    if read not in (channels, 2 * channels + 1):
        raise UserError(
            f"the UNet reads {read} channels; disruption needs one that reads the "
            f"{channels} of the latents, or {2 * channels + 1} with mask and masked "
            "image"
        )
    return read != channels


def latent_mask(mask, factor):
    """The latents that are to be drawn: those with a pixel of the mask under them.

    Args:
      mask: bool [H, W].
      factor: pixels per latent in each direction.

    Returns:
      float32 [1, H / factor, W / factor, 1], 0 or 1.
    """
    height, width = mask.shape
    cells = mask.reshape(height // factor, factor, width // factor, factor)
    return cells.any((1, 3)).astype(jnp.float32)[None, :, :, None]


def make_inpaint(
    generator, *, steps, strength, guidance, negative_token_ids, sampler="ddim", image_scale=1.0
):
    """Builds the jitted function that draws several candidates for one place.

    With a UNet that reads latents alone, those outside the mask are put back after every step
    (`samplers.Known`). An inpainting UNet reads at every step, behind the latents, the mask and the
    latents of the image whose masked pixels are grey; nothing is put back.

    Args:
      steps, guidance, negative_token_ids, sampler, image_scale: see `generate.make_generate`.
      strength: in (0, 1], the share of the steps that is made: how little stays of what was there.

    Raises:
      UserError: there is no such sampler, the steps are none, or the UNet is another kind.

    Returns:
      inpaint(parameters, image, mask, token_ids, time_ids, reference, present, noise, keys) ->
      uint8 [K, H, W, 3], K candidates, of which only what lies inside the mask counts. Of image
      uint8 [H, W, 3], mask bool [H, W], token_ids [2, L], time_ids [6], reference (float
      [R, R, 3] in [0, 1], of the image encoder's size) and present (bool, whether the reference
      is looked at) there is one for all; noise is [K, h, w, C], keys [K].
    """
    reads_mask, spacing = is_inpainting_unet(generator), generator.config.spacing
    guided = samplers.guides(guidance)
    # Once more when it is traced; here it is early enough to tell the user.
    samplers.sampling_timesteps(generator.schedule.timesteps, steps, spacing, sampler)
    samplers.first_step(steps, strength)

    @jax.jit
    def inpaint(parameters, image, mask, token_ids, time_ids, reference, present, noise, keys):
        pixels = image[None].astype(jnp.float32) / 255
        drawn = latent_mask(mask, generator.latent_factor)
        clean, _ = generator.encode_latents(parameters, pixels)

        def for_all(x):
            return jnp.broadcast_to(x, (len(noise), *x.shape[1:]))

        inpainting = None
        if reads_mask:
            inpainting = for_all(_inpainting_channels(generator, parameters, pixels, mask, drawn))
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
                latents=clean, kept=None if reads_mask else 1 - drawn, strength=strength
            ),
        )
        pixels = jnp.clip(generator.decode_latents(parameters, latents), 0, 1)
        return jnp.round(pixels * 255).astype(jnp.uint8)

    return inpaint


def _inpainting_channels(generator, parameters, pixels, mask, drawn):
    """What an inpainting UNet reads behind the latents: [1, h, w, 1 + C]."""
    rest, _ = generator.encode_latents(parameters, jnp.where(mask[None, :, :, None], 0.5, pixels))
    return jnp.concatenate([drawn, rest], axis=-1)


def make_phrase_score(generator, negative_token_ids):
    """Builds the jitted function that says how well a phrase explains what was drawn.

    The measure is that of diffusion classifiers (Li et al. 2023, arXiv 2303.16203): by how much the
    phrase lowers the denoising error inside the mask, here against the empty prompt, averaged over
    a few timesteps of the noisier half. Timesteps and noise are the same for all images.

    Returns:
      fit(parameters, images, mask, token_ids, time_ids) -> float32 [K], higher is better, of
      images uint8 [K, H, W, 3] and the other arguments as in `make_inpaint`.
    """
    reads_mask, schedule = is_inpainting_unet(generator), generator.schedule
    timesteps = np.linspace(*_FIT_RANGE, _FIT_STEPS) * schedule.timesteps
    size = generator.config.image_encoder.image_size

    @jax.jit
    def fit(parameters, images, mask, token_ids, time_ids):
        pixels = images.astype(jnp.float32) / 255
        count, drawn = len(pixels), latent_mask(mask, generator.latent_factor)
        clean, _ = generator.encode_latents(parameters, pixels)

        def for_all(x):
            return jnp.broadcast_to(x, (count, *x.shape[1:]))

        inpainting = None
        if reads_mask:
            inpainting = for_all(
                _inpainting_channels(generator, parameters, pixels[:1], mask, drawn)
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
            error = (error.mean(-1, keepdims=True) * drawn).sum((1, 2, 3)) / drawn.sum()
            return error[count:] - error[:count]

        at = jnp.arange(_FIT_STEPS), jnp.asarray(timesteps, jnp.int32)
        return jax.lax.map(gain, at).mean(0)

    return fit


class Inpainter:
    """Draws candidates for a place in an image, a batch at a time, on devices that share it."""

    def __init__(
        self, model, *, resolution, steps, strength, guidance, sampler="ddim", batch_size=8
    ):
        """Builds the programs.

        Args:
          model: a `training.models.Model`.
          resolution: side in pixels of the squares that the generator draws.
          steps, strength, guidance, sampler: see `make_inpaint`.
          batch_size: candidates at once.

        Raises:
          UserError: as `make_inpaint`, or the resolution does not suit the generator.
        """
        model.generator.config.check_resolution(resolution, "--resolution=")
        self._generator, self._tokenizer = model.generator, model.tokenizer
        self._resolution, self._batch_size = resolution, batch_size
        self._mesh = drawing_mesh(batch_size)
        self._parameters = replicate(model.parameters, self._mesh)
        nothing = model.tokenizer("")
        self._inpaint = make_inpaint(
            model.generator,
            steps=steps,
            strength=strength,
            guidance=guidance,
            sampler=sampler,
            negative_token_ids=nothing,
        )
        self._fit = make_phrase_score(model.generator, nothing)

    def draw(self, image, mask, phrase, seeds, reference=None):
        """Draws what is inside a mask anew.

        The generator sees a square around the mask: of its own resolution or, for a larger subject,
        of `CONTEXT` times the mask's length, at most the image's shorter side; only then pixels
        are resampled. Every candidate depends on its own seed and on nothing beside it.

        Args:
          image: uint8 [H, W, 3].
          mask: bool [H, W], not empty and not longer than the image's shorter side.
          phrase: what to draw.
          seeds: one for each candidate.
          reference: uint8 [h, w, 3], whom to draw; None draws from the phrase alone.

        Returns:
          A list of uint8 [H, W, 3] with the candidates in their place, every pixel outside the mask
          as it was; and how well the phrase explains each (`make_phrase_score`), float32 [K].
        """
        side = self._resolution
        extent = max(high - low for low, high in geometry.bounds(mask))
        square = geometry.square_around(mask, min(max(side, CONTEXT * extent), *image.shape[:2]))
        small, inside = (geometry.pad_to_square(x[square], side) for x in (image, mask))
        size = self._generator.config.image_encoder.image_size
        shown = (
            np.full((size, size, 3), 255, np.uint8)
            if reference is None
            else geometry.pad_to_square(reference, size)
        )
        shared = replicate(
            (small, inside, self._tokenizer(phrase), np.float32([side, side, 0, 0, side, side])),
            self._mesh,
        )
        shown = replicate((np.float32(shown) / 255, np.array(reference is not None)), self._mesh)
        images, phrase_scores = [], []
        for start in range(0, len(seeds), self._batch_size):
            batch = list(seeds[start : start + self._batch_size])
            filled = batch + batch[-1:] * (self._batch_size - len(batch))  # One shape, one program.
            noise = jnp.concatenate(
                [scene_noise(seed, [0], self._generator.latent_shape(side)) for seed in filled]
            )
            # The noise on the way must not repeat that of the start, which folds in 0.
            keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(
                jnp.asarray(filled)
            )
            drawn = np.asarray(
                self._inpaint(
                    self._parameters, *shared, *shown, *shard_batch((noise, keys), self._mesh)
                )
            )
            seen = np.where(inside[..., None], drawn, small)
            phrase_scores.append(
                np.asarray(self._fit(self._parameters, shard_batch(seen, self._mesh), *shared[1:]))[
                    : len(batch)
                ]
            )
            for candidate in drawn[: len(batch)]:
                result = image.copy()
                part = result[square]  # A view: what is put there is put into the result.
                part[mask[square]] = geometry.pad_to_square(candidate, len(part))[mask[square]]
                images.append(result)
        return images, np.concatenate(phrase_scores)
