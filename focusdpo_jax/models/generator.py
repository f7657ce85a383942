"""A personalised image generator as pure functions of its parameters.

This is the interface that training, evaluation and inference use. Another backbone is another class
with these methods. This one is SDXL's: latent diffusion with a UNet, two text encoders, an image
encoder for the subject reference images, and a subject adapter that maps image features to tokens
for decoupled cross-attention.

The parameters are one tree with a root per part (`PARTS`). `split_parameters` splits it into
trainable and frozen leaves; `merge_parameters` is the inverse.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from focusdpo_jax.array_types import AnyArray, Scalar
from focusdpo_jax.diffusion import schedule as noise_schedule
from focusdpo_jax.models import clip
from focusdpo_jax.models.clip import CLIPOutput, CLIPText, CLIPVision

# Names that callers import from here.
from focusdpo_jax.models.generator_config import PARTS as PARTS
from focusdpo_jax.models.generator_config import GeneratorConfig
from focusdpo_jax.models.parameters import TRAINABLE as TRAINABLE
from focusdpo_jax.models.parameters import Params
from focusdpo_jax.models.parameters import merge_parameters as merge_parameters
from focusdpo_jax.models.parameters import split_parameters as split_parameters
from focusdpo_jax.models.subject_adapter import subject_adapter
from focusdpo_jax.models.unet import IMAGE_ATTENTION, UNet
from focusdpo_jax.models.vae import VAE


# Trees of shapes, shardings or None have these types, too, so tests do not check their fields.
@flax.struct.dataclass
@no_type_check
class ImageView:
    """Image encoder outputs for images of any leading shape [...], mostly [B, S] references.

    Attributes:
      features: [..., 1 + N, D] of the penultimate layer: the class token, then N patches row by
        row. The resampler reads all of them, SPAF the patches.
      embedding: [..., P], pooled and projected, for a subject adapter of kind "projection" (plain
        IP-Adapter); None for the other kinds.
      phrases: [..., Q], text embedding of the name of each subject.
      boxes: [..., 4], x0, y0, x1, y1 in [0, 1], the position of each subject in the image to
        generate. Only an adapter of kind "grounding" reads phrases and boxes (see
        `Generator.ground`); they are None for the other kinds.
    """

    features: Float[AnyArray, "*references tokens width"]
    embedding: Float[AnyArray, "*references pooled"] | None = None
    phrases: Float[AnyArray, "*references phrase"] | None = None
    boxes: Float[AnyArray, "*references 4"] | None = None


@flax.struct.dataclass
@no_type_check
class Conditioning:
    """The conditioning inputs of the UNet, for B images and S reference slots.

    Attributes:
      text: [B, L, D] prompt embeddings of both text encoders, concatenated over D.
      pooled: [B, P] pooled prompt embedding.
      time_ids: [B, 6] original height and width, crop top and left, target height and width, in
        pixels.
      image_tokens: [B, S, T, D], T tokens of each reference.
      image_present: bool [B, S]; absent slots contribute nothing.
      image_scales: [B, S], weight of each reference, or None for 1.
      image_masks: [B, S, H, W] in [0, 1], weight of each reference at each position of the image,
        or None for 1 everywhere (see `UNet.__call__`).
    """

    text: Float[AnyArray, "batch length width"]
    pooled: Float[AnyArray, "batch pooled"]
    time_ids: Float[AnyArray, "batch 6"]
    image_tokens: Float[AnyArray, "batch slots tokens width"]
    image_present: Bool[AnyArray, "batch slots"]
    image_scales: Float[AnyArray, "batch slots"] | None = None
    image_masks: Float[AnyArray, "batch slots height width"] | None = None


class Generator:
    """The functions of a personalised generator.

    It holds Flax modules and no parameters. In every method `parameters` is {part: tree}, of which
    only the parts that the method uses need to be present.

    Attributes:
      config: the `GeneratorConfig`.
      schedule: the `NoiseSchedule` of 1000 timesteps.
    """

    def __init__(self, config: GeneratorConfig, dtype: Any = jnp.float32):
        """Builds the modules of every part.

        Args:
          config: sizes and noise schedule.
          dtype: type of the computation; the autoencoder's encoder always computes in float32.
        """
        self.config = config
        self.unet = UNet(config.unet, dtype)
        self.vae = VAE(config.vae, dtype)
        self.text_encoder = CLIPText(config.text_encoder, dtype)
        self.text_encoder_2 = CLIPText(config.text_encoder_2, dtype)
        self.image_encoder = CLIPVision(config.image_encoder, dtype)
        self.adapter = subject_adapter(config.adapter, dtype)
        self.schedule = noise_schedule.scaled_linear_schedule(
            config.prediction_type, zero_terminal_snr=config.zero_terminal_snr
        )

    @property
    def latent_factor(self) -> int:
        """Pixels per latent in each direction; 8 for SDXL."""
        return self.config.vae.factor

    @property
    def patch_grid(self) -> int:
        """Patches along each side of the image encoder's input."""
        return self.config.image_encoder.image_size // self.config.image_encoder.patch_size

    @property
    def match_captures(self) -> dict[str, str]:
        """Names to `capture` in `denoise` for matching an image with its references.

        The keys name the feature source. Of the UNet's blocks it is the middle one of
        the decoder: its features are semantic enough to match and fine enough to locate.
        """
        middle = (len(self.config.unet.block_out_channels) - 1) // 2
        return {"unet": f"up_blocks_{middle}", "attention": IMAGE_ATTENTION}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (height, width, channels) of the latents of a square image.

        Args:
          resolution: side of the image in pixels.
        """
        side = resolution // self.latent_factor
        return side, side, self.config.vae.latent_channels

    def init_part(self, part: str, key: PRNGKeyArray) -> dict[str, Any]:
        """Returns random float32 parameters of one of `PARTS`."""
        config, unet = self.config, self.config.unet
        if part == "unet":
            tokens = jnp.zeros((1, 1, config.adapter.num_tokens, unet.cross_attention_dim))
            inputs = (
                jnp.zeros((1, 8, 8, unet.in_channels)),
                jnp.zeros((1,)),
                jnp.zeros((1, 1, unet.cross_attention_dim)),
                jnp.zeros((1, unet.pooled_dim)),
                jnp.zeros((1, 6)),
                tokens,
                jnp.ones((1, 1), bool),
            )
        elif part == "vae":
            side = 2 * self.latent_factor
            inputs = (jnp.zeros((1, side, side, 3)),)
        elif part == "image_encoder":
            size = config.image_encoder.image_size
            inputs = (jnp.zeros((1, size, size, 3)),)
        elif part == "adapter":
            patches = () if config.adapter.kind == "projection" else (2,)
            inputs = (jnp.zeros((1, 1, *patches, config.adapter.input_dim)),)
        else:
            inputs = (jnp.zeros((1, 2), jnp.int32),)
        return getattr(self, part).init(key, *inputs)["params"]

    def encode_latents(
        self, parameters: Params, pixels: Float[AnyArray, "batch image_height image_width 3"]
    ) -> tuple[
        Float[Array, "batch height width channels"], Float[Array, "batch height width channels"]
    ]:
        """Computes the posterior of the latents, in the UNet's scale.

        Args:
          pixels: [B, H, W, 3] in [0, 1]; H and W are multiples of f = `latent_factor`.

        Returns:
          Mean and standard deviation, each [B, H / f, W / f, C] in float32.
        """
        mean, log_variance = _apply(self.vae, parameters["vae"], pixels * 2 - 1, method="encode")
        scale = self.config.vae.scaling_factor
        return mean * scale, jnp.exp(0.5 * log_variance) * scale

    def decode_latents(
        self, parameters: Params, latents: Float[AnyArray, "batch height width channels"]
    ) -> Float[Array, "batch image_height image_width 3"]:
        """Decodes latents in the UNet's scale to pixels, about [0, 1] and not clipped."""
        latents = latents / self.config.vae.scaling_factor
        pixels = _apply(self.vae, parameters["vae"], latents, method="decode")
        return pixels / 2 + 0.5

    def encode_text(
        self, parameters: Params, token_ids: Int[AnyArray, "batch 2 length"]
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch pooled"]]:
        """Computes prompt embeddings with both text encoders, as SDXL does.

        Args:
          token_ids: int [B, 2, L], one row for each text encoder.

        Returns:
          text [B, L, D1 + D2], the penultimate hidden states of both encoders, and pooled [B, P],
          the projection of the second.
        """
        first: CLIPOutput = _apply(self.text_encoder, parameters["text_encoder"], token_ids[:, 0])
        second: CLIPOutput = _apply(
            self.text_encoder_2, parameters["text_encoder_2"], token_ids[:, 1]
        )
        text = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        return text, second.projected

    def encode_negative(
        self, parameters: Params, token_ids: Int[AnyArray, "batch 2 length"]
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch pooled"]]:
        """Computes the unconditional embeddings of guidance and of dropped captions.

        Arguments and result are those of `encode_text`, except that an empty prompt gives zeros
        where `config.zero_empty_prompt` (SDXL base).
        """
        text, pooled = self.encode_text(parameters, token_ids)
        if not self.config.zero_empty_prompt:
            return text, pooled
        config = self.config.text_encoder
        # The end-of-text token is the last entry of CLIP's vocabulary, also where a configuration
        # has the legacy id.
        end = (
            config.vocab_size - 1 if config.eos_token_id == clip.LEGACY_EOS else config.eos_token_id
        )
        empty = token_ids[:, 0, 1] == end
        return jnp.where(empty[:, None, None], 0, text), jnp.where(empty[:, None], 0, pooled)

    def encode_reference(
        self, parameters: Params, pixels: Float[AnyArray, "*references height width 3"]
    ) -> ImageView:
        """Computes the image features that the subject adapter and SPAF read.

        Args:
          pixels: [..., H, W, 3] in [0, 1], of the image encoder's own size.
        """
        shape = pixels.shape
        encoded = self.encode_image(parameters, pixels.reshape(-1, *shape[-3:]))
        pooled = encoded.projected if self.config.adapter.kind == "projection" else None
        return jax.tree.map(
            lambda x: x.reshape(*shape[:-3], *x.shape[1:]), ImageView(encoded.penultimate, pooled)
        )

    def encode_image(
        self, parameters: Params, pixels: Float[AnyArray, "batch height width 3"]
    ) -> CLIPOutput:
        """Computes all outputs of the image encoder.

        Args:
          pixels: [B, H, W, 3] in [0, 1]. Images of another size than the encoder's are resized to
            it by antialiased bicubic interpolation and clipped, as CLIP's preprocessing does.
        """
        size = self.config.image_encoder.image_size
        if pixels.shape[1:3] != (size, size):
            shape = (len(pixels), size, size, 3)
            pixels = jnp.clip(jax.image.resize(pixels, shape, "cubic", antialias=True), 0, 1)
        return _apply(
            self.image_encoder,
            parameters["image_encoder"],
            clip.normalise_images(jnp.asarray(pixels)),
        )

    def subject_tokens(
        self, parameters: Params, view: ImageView
    ) -> Float[Array, "batch slots tokens width"]:
        """Maps the `ImageView` [B, S] of references to tokens [B, S, T, D] for cross-attention."""
        kind = self.config.adapter.kind
        features = view.embedding if kind == "projection" else view.features
        assert features is not None, "encode_reference sets it for this kind of adapter"
        ground = (view.phrases, view.boxes) if kind == "grounding" else ()
        return _apply(self.adapter, parameters["adapter"], features.astype(jnp.float32), *ground)

    def ground(
        self,
        parameters: Params,
        view: ImageView,
        phrase_ids: Int[AnyArray, "batch slots length"],
        boxes: Float[AnyArray, "batch slots 4"],
    ) -> ImageView:
        """Adds phrases and boxes to the view of references, for an adapter of kind "grounding".

        Args:
          view: `ImageView` [B, S].
          phrase_ids: int [B, S, L], token ids of each subject's phrase for the first text encoder.
          boxes: [B, S, 4], x0, y0, x1, y1 in [0, 1], each subject's position in the image to
            generate.
        """
        encoded: CLIPOutput = _apply(
            self.text_encoder,
            parameters["text_encoder"],
            phrase_ids.reshape(-1, phrase_ids.shape[-1]),
        )
        phrases = encoded.pooled.reshape(*phrase_ids.shape[:-1], -1)
        return dataclasses.replace(view, phrases=phrases, boxes=boxes)

    def blank_reference(self, parameters: Params) -> ImageView | None:
        """Computes the input of the subject adapter that replaces a dropped reference.

        Returns:
          `ImageView` [1, 1] of an image of CLIP's mean color, with an embedding of zeros; None
          where `config.adapter.dropped` is "absent", which masks dropped references out instead.
        """
        if self.config.adapter.dropped == "absent":
            return None
        size = self.config.image_encoder.image_size
        blank = self.encode_reference(
            parameters, jnp.broadcast_to(jnp.array(clip.MEAN), (1, 1, size, size, 3))
        )
        if blank.embedding is not None:
            blank = dataclasses.replace(blank, embedding=jnp.zeros_like(blank.embedding))
        return blank

    def drop_references(
        self,
        parameters: Params,
        conditioning: Conditioning,
        dropped: Bool[AnyArray, " batch"],
        blank: ImageView | None,
    ) -> Conditioning:
        """Removes the references of the examples where `dropped`.

        Args:
          conditioning: conditioning of B images.
          dropped: bool [B].
          blank: the result of `blank_reference`.
        """
        if blank is None:
            return dataclasses.replace(
                conditioning, image_present=conditioning.image_present & ~dropped[:, None]
            )
        tokens = self.subject_tokens(parameters, blank)
        return dataclasses.replace(
            conditioning,
            image_tokens=jnp.where(dropped[:, None, None, None], tokens, conditioning.image_tokens),
        )

    def denoise(
        self,
        parameters: Params,
        latents: Float[AnyArray, "batch height width in_channels"],
        timesteps: Float[AnyArray, " batch"] | Int[AnyArray, " batch"],
        conditioning: Conditioning,
        *,
        image_scale: Scalar = 1.0,
        capture: Sequence[str] = (),
    ) -> tuple[Float[Array, "batch height width channels"], dict[str, Array]]:
        """Runs the UNet.

        Args:
          latents: [B, h, w, C] noisy latents.
          timesteps: [B] in [0, 1000).
          conditioning: conditioning of B images, or of fewer, each of which is shared by several
            consecutive latents.
          image_scale: weight of the image branch.
          capture: see `UNet.__call__`.

        Returns:
          The prediction [B, h, w, C] in float32, and the captured arrays by name.
        """
        return _apply(
            self.unet,
            parameters["unet"],
            latents,
            timesteps,
            conditioning.text,
            conditioning.pooled,
            conditioning.time_ids,
            conditioning.image_tokens,
            conditioning.image_present,
            image_scale,
            image_scales=conditioning.image_scales,
            image_masks=conditioning.image_masks,
            capture=capture,
        )


def _apply(module: nn.Module, parameters: Params, *arguments: Any, **keywords: Any) -> Any:
    """Calls a module; no collection is mutable, so that only the output is returned."""
    return module.apply({"params": parameters}, *arguments, **keywords)
