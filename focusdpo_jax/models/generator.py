"""A personalised image generator as pure functions of its parameters.

Training and evaluation meet a generator only through this file. Another backbone is another class
with these methods; this one is SDXL's: latent diffusion with a UNet, two text encoders, an image
encoder for the subject reference images, and a subject adapter that turns what it says of them
into tokens for decoupled cross-attention.

The parameters are one tree with a root per part (`PARTS`). `split_parameters` divides it into what
is trained and what is frozen; `merge_parameters` puts it together again.
"""

import dataclasses
import json

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util

from focusdpo_jax.diffusion import schedule as noise_schedule
from focusdpo_jax.diffusion.samplers import Spacing
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import clip
from focusdpo_jax.models.clip import (
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig, subject_adapter
from focusdpo_jax.models.unet import IMAGE_ATTENTION, UNet, UNetConfig
from focusdpo_jax.models.vae import VAE, VAEConfig

PARTS = ("unet", "adapter", "text_encoder", "text_encoder_2", "image_encoder", "vae")

# What each choice of `config.trainable` optimises, as a test of a parameter's path.
TRAINABLE = {
    # The subject adapter: its resampler and the image keys and values inside the UNet.
    "adapter": lambda path: path[0] == "adapter" or path[-2] in ("to_k_ip", "to_v_ip"),
    # Low-rank updates of the UNet's attention projections.
    "lora": lambda path: path[-1] in ("lora_a", "lora_b"),
    # UNet and subject adapter.
    "full": lambda path: path[0] in ("unet", "adapter"),
    # Everything that denoising shapes: what pre-training a generator from nothing needs.
    "generator": lambda path: path[0] in ("unet", "adapter", "text_encoder", "text_encoder_2"),
}


# Fields of GeneratorConfig that model.json had not always.
_NEWER = {"timestep_spacing", "steps_offset", "set_alpha_to_one"}


def check_parts(unet, vae, text_encoder, text_encoder_2):
    """Raises a UserError where parts, given by their configurations, are not of one generator.

    Channels that the UNet reads besides latents are checked by the caller
    (`GeneratorConfig.further_channels`).
    """
    width = text_encoder.hidden_size + text_encoder_2.hidden_size
    for name, value, theirs, given in (
        ("unet.out_channels", unet.out_channels, "vae.latent_channels", vae.latent_channels),
        (
            "unet.cross_attention_dim",
            unet.cross_attention_dim,
            "text_encoder.hidden_size + text_encoder_2.hidden_size",
            width,
        ),
        (
            "unet.pooled_dim",
            unet.pooled_dim,
            "text_encoder_2.projection_dim",
            text_encoder_2.projection_dim,
        ),
        ("vae.in_channels", vae.in_channels, "the channels of a picture", 3),
    ):
        if value != given:
            raise UserError(
                f"{name} = {value}, but {theirs} = {given}: take parts that belong to one "
                "SDXL model"
            )
    if unet.in_channels < vae.latent_channels:
        raise UserError(
            f"unet.in_channels = {unet.in_channels}, but vae.latent_channels = "
            f"{vae.latent_channels}: take parts that belong to one SDXL model"
        )


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of every part, and how the noise is scheduled and predicted.

    Attributes:
      prediction_type: "epsilon" (SDXL) or "v_prediction".
      zero_terminal_snr: rescale the schedule so that the last timestep is pure noise.
      zero_empty_prompt: guidance leads away from embeddings of zeros where there is no negative
        prompt (SDXL base, `force_zeros_for_empty_prompt`), and not from those of the empty prompt.
      timestep_spacing, steps_offset, set_alpha_to_one: which timesteps are visited in drawing (see
        `samplers.Spacing`). The spacing None is "trailing" with zero terminal SNR, whose last
        timestep has to be visited, and otherwise "leading".
    """

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    image_encoder: CLIPVisionConfig
    adapter: SubjectAdapterConfig
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    zero_empty_prompt: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = True

    def __post_init__(self):
        _ = self.spacing  # Raises for an unknown one.
        check_parts(self.unet, self.vae, self.text_encoder, self.text_encoder_2)
        encoder, adapter = self.image_encoder, self.adapter
        pooled = adapter.kind == "projection"
        given = encoder.projection_dim if pooled else encoder.hidden_size
        if adapter.input_dim != given:
            raise UserError(
                f"adapter.input_dim = {adapter.input_dim}, but what a subject adapter of kind = "
                f"{adapter.kind!r} reads is image_encoder."
                f"{'projection_dim' if pooled else 'hidden_size'} = {given} wide: take the image "
                "encoder that it was trained with"
            )
        if adapter.output_dim != self.unet.cross_attention_dim:
            raise UserError(
                f"adapter.output_dim = {adapter.output_dim}, but the UNet reads tokens of width "
                f"unet.cross_attention_dim = {self.unet.cross_attention_dim}: take an adapter made "
                "for it"
            )
        if adapter.kind == "grounding" and adapter.phrase_dim != self.text_encoder.hidden_size:
            raise UserError(
                f"adapter.phrase_dim = {adapter.phrase_dim}, but a phrase's embedding is "
                f"text_encoder.hidden_size = {self.text_encoder.hidden_size} wide"
            )

    @property
    def spacing(self):
        """The `samplers.Spacing` that pictures are drawn with."""
        name = self.timestep_spacing or ("trailing" if self.zero_terminal_snr else "leading")
        return Spacing(name, self.steps_offset, self.set_alpha_to_one)

    @property
    def further_channels(self):
        """Channels that the UNet reads besides the latents: 0 of SDXL base, 5 of an inpainting UNet."""
        return self.unet.in_channels - self.vae.latent_channels

    def to_json(self):
        """The configuration as JSON text, which `from_json` reads back.

        Fields that older files lack are left out at their defaults.
        """
        values = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in _NEWER and values[field.name] == field.default:
                del values[field.name]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def check_resolution(self, resolution, field="config.resolution = "):
        """Raises a UserError where there are no latents for a side of so many pixels.

        Args:
          field: what the user gave it as, up to its value.
        """
        factor = self.vae.factor
        if resolution < factor or resolution % factor:
            nearest = max(1, round(resolution / factor)) * factor
            raise UserError(
                f"{field}{resolution}: a latent of this model covers {factor} pixels in each "
                f"direction; give a positive multiple of {factor}, such as {nearest}"
            )

    @classmethod
    def from_json(cls, text):
        """Reads what `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values):
        """Builds the configuration from nested dicts of its fields."""
        values = dict(values)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                part = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in values[field.name].items()
                }
                values[field.name] = field.type(**part)
        return cls(**values)


@flax.struct.dataclass
class ImageView:
    """What the image encoder says of pictures [...].

    Attributes:
      features: [..., 1 + N, D] of the penultimate layer: the class token, then the patches row by
        row. The resampler reads all, SPAF the patches.
      embedding: [..., P], pooled and projected, if the subject adapter is one that reads it (plain
        IP-Adapter); otherwise None.
      phrases: [..., Q], embedding of what each picture shows, and
      boxes: [..., 4], where it shall stand in the picture to draw (see `Generator.ground`); both
        are None unless they are given to an adapter of kind "grounding", which alone reads them.
    """

    features: jax.Array
    embedding: jax.Array | None = None
    phrases: jax.Array | None = None
    boxes: jax.Array | None = None


@flax.struct.dataclass
class Conditioning:
    """What the UNet is conditioned on, for B images and S reference slots.

    Attributes:
      text: [B, L, D] prompt embeddings of both text encoders, side by side.
      pooled: [B, P] pooled prompt embedding.
      time_ids: [B, 6] original height and width, crop top and left, target height and width.
      image_tokens: [B, S, T, D] tokens of each reference.
      image_present: bool [B, S]; absent slots contribute nothing.
      image_scales: [B, S], weight of each reference, or None for 1.
      image_masks: [B, S, H, W] in [0, 1], where in the picture each reference may show itself, or
        None for everywhere (see `UNet.__call__`).
    """

    text: jax.Array
    pooled: jax.Array
    time_ids: jax.Array
    image_tokens: jax.Array
    image_present: jax.Array
    image_scales: jax.Array | None = None
    image_masks: jax.Array | None = None


class Generator:
    """The functions of a personalised generator; it holds modules and no parameters."""

    def __init__(self, config, dtype=jnp.float32):
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
    def latent_factor(self):
        """Pixels per latent, in each direction."""
        return self.config.vae.factor

    @property
    def patch_grid(self):
        """Patches of the image encoder along each side."""
        return self.config.image_encoder.image_size // self.config.image_encoder.patch_size

    @property
    def match_captures(self):
        """What `denoise` can keep to match a picture with its references, by the source's name.

        Of the blocks, the middle of the way up: semantic enough to match, fine enough to place.
        """
        middle = (len(self.config.unet.block_out_channels) - 1) // 2
        return {"unet": f"up_blocks_{middle}", "attention": IMAGE_ATTENTION}

    def latent_shape(self, resolution):
        """(height, width, channels) of the latents of a square image."""
        side = resolution // self.latent_factor
        return side, side, self.config.vae.latent_channels

    def init_part(self, part, key):
        """Random float32 parameters of one of PARTS."""
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

    def encode_latents(self, parameters, pixels):
        """Posterior of the latents, scaled as the UNet takes them.

        Args:
          pixels: [B, H, W, 3] in [0, 1].

        Returns:
          mean and standard deviation, each [B, H / f, W / f, C] in float32.
        """
        mean, log_variance = self.vae.apply(
            {"params": parameters["vae"]}, pixels * 2 - 1, method="encode"
        )
        scale = self.config.vae.scaling_factor
        return mean * scale, jnp.exp(0.5 * log_variance) * scale

    def decode_latents(self, parameters, latents):
        """Pixels [B, H, W, 3], about [0, 1] and not clipped, from the UNet's latents."""
        pixels = self.vae.apply(
            {"params": parameters["vae"]}, latents / self.config.vae.scaling_factor, method="decode"
        )
        return pixels / 2 + 0.5

    def encode_text(self, parameters, token_ids):
        """Prompt embeddings and pooled embedding, as SDXL uses its two encoders.

        Args:
          token_ids: int [B, 2, L], one row for each text encoder.

        Returns:
          text [B, L, D1 + D2] (both penultimate hidden states) and pooled [B, P] (the second
          encoder's projection).
        """
        first = self.text_encoder.apply({"params": parameters["text_encoder"]}, token_ids[:, 0])
        second = self.text_encoder_2.apply(
            {"params": parameters["text_encoder_2"]}, token_ids[:, 1]
        )
        text = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
        return text, second.projected

    def encode_negative(self, parameters, token_ids):
        """As `encode_text`, of what guidance leads away from and what dropped captions become.

        An empty prompt gives zeros where `config.zero_empty_prompt`.
        """
        embeddings = self.encode_text(parameters, token_ids)
        if not self.config.zero_empty_prompt:
            return embeddings
        config = self.config.text_encoder
        # The end of a text is the last word of CLIP's vocabulary, also where a configuration has a
        # legacy id.
        end = (
            config.vocab_size - 1 if config.eos_token_id == clip.LEGACY_EOS else config.eos_token_id
        )
        empty = token_ids[:, 0, 1] == end
        return tuple(jnp.where(empty.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in embeddings)

    def encode_reference(self, parameters, pixels):
        """The `ImageView` of pictures: all that subject adapter and SPAF need to know of them.

        Args:
          pixels: [..., H, W, 3] in [0, 1], of the image encoder's own size.
        """
        shape = pixels.shape
        seen = self.encode_image(parameters, pixels.reshape(-1, *shape[-3:]))
        pooled = seen.projected if self.config.adapter.kind == "projection" else None
        return jax.tree.map(
            lambda x: x.reshape(*shape[:-3], *x.shape[1:]), ImageView(seen.penultimate, pooled)
        )

    def encode_image(self, parameters, pixels):
        """Everything the image encoder says (`CLIPOutput`) of pixels [B, H, W, 3] in [0, 1].

        Pictures of another size than the encoder's are brought to it as CLIP's preprocessing does.
        """
        size = self.config.image_encoder.image_size
        if pixels.shape[1:3] != (size, size):
            shape = (len(pixels), size, size, 3)
            pixels = jnp.clip(jax.image.resize(pixels, shape, "cubic", antialias=True), 0, 1)
        return self.image_encoder.apply(
            {"params": parameters["image_encoder"]}, clip.normalise_images(pixels)
        )

    def subject_tokens(self, parameters, view):
        """Tokens [B, S, T, D] of the subject adapter from the `ImageView` [B, S] of references."""
        kind = self.config.adapter.kind
        read = (view.embedding if kind == "projection" else view.features).astype(jnp.float32)
        ground = (view.phrases, view.boxes) if kind == "grounding" else ()
        return self.adapter.apply({"params": parameters["adapter"]}, read, *ground)

    def ground(self, parameters, view, phrase_ids, boxes):
        """Adds to a view of references what they are called and where they shall stand.

        Args:
          view: `ImageView` [B, S].
          phrase_ids: int [B, S, L], tokens of a phrase each, for the first text encoder.
          boxes: [B, S, 4], x0, y0, x1, y1 in [0, 1] of the picture to draw.
        """
        encoded = self.text_encoder.apply(
            {"params": parameters["text_encoder"]}, phrase_ids.reshape(-1, phrase_ids.shape[-1])
        )
        phrases = encoded.pooled.reshape(*phrase_ids.shape[:-1], -1)
        return view.replace(phrases=phrases, boxes=boxes)

    def blank_reference(self, parameters):
        """What the subject adapter reads in place of a dropped reference.

        Returns:
          `ImageView` [1, 1] of an image of CLIP's mean color, its embedding zero; None where
          `config.adapter.dropped` is "absent", and a dropped reference is an absent one.
        """
        if self.config.adapter.dropped == "absent":
            return None
        size = self.config.image_encoder.image_size
        blank = self.encode_reference(
            parameters, jnp.broadcast_to(jnp.array(clip.MEAN), (1, 1, size, size, 3))
        )
        if blank.embedding is not None:
            blank = blank.replace(embedding=jnp.zeros_like(blank.embedding))
        return blank

    def drop_references(self, parameters, conditioning, dropped, blank):
        """Takes the references away where `dropped`, bool [B]; `blank` is of `blank_reference`."""
        if blank is None:
            return conditioning.replace(
                image_present=conditioning.image_present & ~dropped[:, None]
            )
        tokens = self.subject_tokens(parameters, blank)
        return conditioning.replace(
            image_tokens=jnp.where(dropped[:, None, None, None], tokens, conditioning.image_tokens)
        )

    def denoise(self, parameters, latents, timesteps, conditioning, *, image_scale=1.0, capture=()):
        """The UNet's prediction [B, h, w, C] and what was captured (see `UNet.__call__`).

        Of latents [B, h, w, C] and timesteps [B]; the rows of the conditioning may be fewer.
        """
        return self.unet.apply(
            {"params": parameters["unet"]},
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


def split_parameters(parameters, trainable):
    """Divides a parameter tree.

    Args:
      parameters: {part: tree}.
      trainable: a name in TRAINABLE.

    Returns:
      (trainable, frozen): two nested dicts without a common leaf.

    Raises:
      UserError: nothing in the tree answers to the name.
    """
    flat = traverse_util.flatten_dict(parameters)
    chosen = {path for path in flat if TRAINABLE[trainable](path)}
    if not chosen:
        raise UserError(
            f"config.trainable = {trainable!r}: the model has no such parameters"
            + (" (set config.model.lora_rank, for example to 8)" if trainable == "lora" else "")
        )
    parts = [{p: v for p, v in flat.items() if (p in chosen) == wanted} for wanted in (True, False)]
    return tuple(traverse_util.unflatten_dict(part) for part in parts)


def merge_parameters(trainable, frozen):
    """Puts together what `split_parameters` divided."""
    flat = traverse_util.flatten_dict(frozen)
    flat.update(traverse_util.flatten_dict(trainable))
    return traverse_util.unflatten_dict(flat)
