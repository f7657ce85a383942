"""Sizes of a generator's parts, its noise schedule and its sampler's timesteps."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from focusdpo_jax.diffusion.samplers import Spacing
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig
from focusdpo_jax.models.unet_config import UNetConfig
from focusdpo_jax.models.vae import VAEConfig

# The roots of a generator's parameter tree.
PARTS = ("unet", "adapter", "text_encoder", "text_encoder_2", "image_encoder", "vae")

# Fields of GeneratorConfig that were added after the first release of model.json.
_NEWER = {"timestep_spacing", "steps_offset", "set_alpha_to_one"}


def check_parts(
    unet: UNetConfig,
    vae: VAEConfig,
    text_encoder: CLIPTextConfig,
    text_encoder_2: CLIPTextConfig,
) -> None:
    """Checks that the widths of the parts agree.

    The caller checks input channels of the UNet beyond the latents
    (`GeneratorConfig.extra_channels`).

    Raises:
      UserError: two parts disagree; it names both fields and their values.
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
        ("vae.in_channels", vae.in_channels, "the channels of an RGB image", 3),
    ):
        if value != given:
            raise UserError(
                f"{name} = {value}, but {theirs} = {given}: use parts that belong to one SDXL model"
            )
    if unet.in_channels < vae.latent_channels:
        raise UserError(
            f"unet.in_channels = {unet.in_channels}, but vae.latent_channels = "
            f"{vae.latent_channels}: use parts that belong to one SDXL model"
        )


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Configuration of a personalised generator.

    Attributes:
      unet, vae, text_encoder, text_encoder_2, image_encoder, adapter: sizes of each part.
      prediction_type: "epsilon" (SDXL) or "v_prediction".
      zero_terminal_snr: rescale the schedule so that the last timestep is pure noise.
      zero_empty_prompt: where there is no negative prompt, classifier-free guidance uses embeddings
        of zeros (SDXL base, `force_zeros_for_empty_prompt`) instead of those of the empty prompt.
      timestep_spacing, steps_offset, set_alpha_to_one: timesteps of the sampler (see
        `samplers.Spacing`). The spacing None is "trailing" with zero terminal SNR, where the last
        timestep must be visited, and "leading" otherwise.

    Raises:
      UserError: fields of different parts disagree, or the spacing is unknown.
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
                f"adapter.input_dim = {adapter.input_dim}, but a subject adapter of kind = "
                f"{adapter.kind!r} reads features of width image_encoder."
                f"{'projection_dim' if pooled else 'hidden_size'} = {given}: use the image "
                "encoder that it was trained with"
            )
        if adapter.output_dim != self.unet.cross_attention_dim:
            raise UserError(
                f"adapter.output_dim = {adapter.output_dim}, but the UNet reads tokens of width "
                f"unet.cross_attention_dim = {self.unet.cross_attention_dim}: use an adapter "
                "trained for it"
            )
        if adapter.kind == "grounding" and adapter.phrase_dim != self.text_encoder.hidden_size:
            raise UserError(
                f"adapter.phrase_dim = {adapter.phrase_dim}, but the embedding of a phrase has "
                f"width text_encoder.hidden_size = {self.text_encoder.hidden_size}"
            )

    @property
    def spacing(self) -> Spacing:
        """The timestep spacing of the sampler."""
        name = self.timestep_spacing or ("trailing" if self.zero_terminal_snr else "leading")
        return Spacing(name, self.steps_offset, self.set_alpha_to_one)

    @property
    def extra_channels(self) -> int:
        """Input channels of the UNet beyond the latents: 0 for SDXL base, 5 for inpainting."""
        return self.unet.in_channels - self.vae.latent_channels

    def to_json(self) -> str:
        """Returns the configuration as JSON text, the inverse of `from_json`.

        Fields that older files lack are omitted at their default values.
        """
        values = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in _NEWER and values[field.name] == field.default:
                del values[field.name]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def check_resolution(self, resolution: int, field: str = "config.resolution = ") -> None:
        """Checks that an image side is a positive multiple of the autoencoder's factor.

        Args:
          resolution: side of the image in pixels.
          field: the option as the user wrote it, up to its value, for the message.

        Raises:
          UserError: it is not; the message names the nearest multiple.
        """
        factor = self.vae.factor
        if resolution < factor or resolution % factor:
            nearest = max(1, round(resolution / factor)) * factor
            raise UserError(
                f"{field}{resolution}: a latent of this model covers {factor} pixels in each "
                f"direction; give a positive multiple of {factor}, such as {nearest}"
            )

    @classmethod
    def from_json(cls, text: str) -> "GeneratorConfig":
        """Parses the text of `to_json`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GeneratorConfig":
        """Builds the configuration from nested dicts of its fields; lists become tuples."""
        values = dict(values)
        for field in dataclasses.fields(cls):
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                part = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in values[field.name].items()
                }
                values[field.name] = field.type(**part)
        return cls(**values)
