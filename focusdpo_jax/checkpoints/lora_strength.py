"""The scale of a file's low-rank updates (LoRA) from metadata outside its tensors.

Besides the `.alpha` tensors of kohya's files, three places can have alpha and rank:

    lora_adapter_metadata   in the header of a safetensors file that diffusers wrote: JSON of PEFT's
                            `LoraConfig`, its fields under "unet.", "text_encoder." and so on
    adapter_config.json     beside PEFT's adapter_model.safetensors: the same fields, of one model
    ss_network_alpha        in the header of kohya's files, whose tensors repeat it for every layer

PEFT (huggingface/peft, `LoraModel._create_and_replace`) scales an update by alpha / rank, or by
alpha / sqrt(rank) if `use_rslora`. `rank_pattern` and `alpha_pattern` have values for single
layers: that of the first key for which the regular expression "(.*\\.)?(KEY)$" matches the layer's
name from its start.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import read_json

HEADER = "lora_adapter_metadata"
CONFIG = "adapter_config.json"
# PEFT's defaults.
_RANK, _ALPHA = 8, 8
# Fields of PEFT that change the layers in other ways than by a low-rank update, with the values
# that do not.
_PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": (),
    "fan_in_fan_out": (False,),
    "layer_replication": (),
    "lora_bias": (False,),
    "trainable_token_indices": (),
    "target_parameters": (),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "alora_invocation_tokens": (),
}
# Initialisations that also change the base weights, which a file of updates does not contain.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's `LoraConfig` that determine the scale of a layer's update.

    Attributes:
      rank, alpha: rank and alpha of layers that no pattern matches.
      rank_pattern, alpha_pattern: {regular expression: value}; the first match is used.
      root: whether alpha is divided by the square root of the rank (rsLoRA, arXiv 2312.03732).
      source: name of the file for messages.
    """

    rank: int = _RANK
    alpha: float = _ALPHA
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    root: bool = False
    source: str = CONFIG

    @classmethod
    def of(cls, fields: Mapping[str, Any], source: str) -> "AdapterConfig":
        """Converts a dict of PEFT's fields.

        Args:
          fields: fields of a `LoraConfig`.
          source: name of the file for messages.

        Raises:
          UserError: a field describes more than low-rank updates, or has an invalid value.
        """
        other = [
            f"{name} = {fields[name]!r}"
            for name, plain in _PLAIN.items()
            if fields.get(name) and fields[name] not in plain
        ]
        init = fields.get("init_lora_weights", True)
        if isinstance(init, str) and _CHANGES_BASE.match(init):
            other.append(f"init_lora_weights = {init!r} (which changes the base's weights, too)")
        if other:
            raise UserError(
                f"{source} describes more than low-rank updates: {', '.join(other)}. Only "
                "plain LoRA is supported: merge the adapter into its base with PEFT "
                "(merge_and_unload) and start from that, or train it without."
            )
        patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        rank, alpha = fields.get("r", _RANK), fields.get("lora_alpha", _ALPHA)
        for name, value in {
            "r": rank,
            "lora_alpha": alpha,
            **{
                f"{field}[{key!r}]": value
                for field, pattern in patterns.items()
                for key, value in _items(pattern, field, source)
            },
        }.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (
                not number
                or not math.isfinite(value)
                or (name.startswith("r") and (value < 1 or value != int(value)))
            ):
                raise UserError(
                    f"{source}: {name} = {value!r}: give a finite number, and for a rank a "
                    "positive whole one."
                )
        return cls(rank, alpha, root=bool(fields.get("use_rslora")), source=source, **patterns)

    def scale(self, layer: str, rank: int) -> float:
        """Returns the scale of a layer's update.

        Args:
          layer: name in the trained model, such as "mid_block.attentions.0.proj_in".
          rank: rank of the matrices.

        Raises:
          UserError: the configuration has another rank for the layer.
        """
        stated = self._of(self.rank_pattern, layer, self.rank)
        if stated != rank:
            raise UserError(
                f"{self.source} has rank {stated} for {layer}, whose matrices have rank "
                f"{rank}: they do not belong together."
            )
        alpha = self._of(self.alpha_pattern, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def _of(self, pattern: Mapping[str, Any], layer: str, value: Any) -> Any:
        for key, own in pattern.items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return own
        return value


def _items(pattern: Any, name: str, source: str) -> Iterable[tuple[str, Any]]:
    """Returns the items of a pattern after checking that its keys are regular expressions."""
    if not isinstance(pattern, dict):
        raise UserError(f"{source}: {name} = {pattern!r}: give an object of layers and values.")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(
                f"{source}: {name}[{key!r}] is not a regular expression ({error})."
            ) from error
    return pattern.items()


def of_folder(folder: epath.Path) -> AdapterConfig:
    """Reads the adapter_config.json of a PEFT folder.

    Raises:
      UserError: it is missing, damaged or unsupported.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UserError(
            f"{path} is missing: PEFT keeps alpha there and not in its tensors. Copy it from where "
            "adapter_model.safetensors comes from."
        )
    return AdapterConfig.of(read_json(path), str(path))


def of_header(
    metadata: Mapping[str, str], parts: tuple[str, ...], source: str
) -> dict[str, AdapterConfig]:
    """Reads the configuration that diffusers writes to a file's header: {part: AdapterConfig}.

    Args:
      metadata: metadata of the header. The result is empty if it has no such field.
      parts: names of the parts that the file may update. Fields without a part's name are the
        UNet's, as `UNet2DConditionModel.save_lora_adapter` writes them.
      source: name of the file for messages.

    Raises:
      UserError: the field is damaged or unsupported.
    """
    if HEADER not in metadata:
        return {}
    source = f"{HEADER} of {source}"
    try:
        fields = json.loads(metadata[HEADER])
    except ValueError as error:
        raise UserError(f"{source} is damaged: {error}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{source} is damaged: it is not a JSON object.")
    by_part: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        part, dot, field = name.partition(".")
        part, field = (part, field) if dot and part in parts else ("unet", name)
        by_part.setdefault(part, {})[field] = value
    return {part: AdapterConfig.of(values, source) for part, values in by_part.items()}


def kohya_alpha(metadata: Mapping[str, str], source: str) -> float | None:
    """Returns `ss_network_alpha` of a kohya file's header, or None if there is none.

    Raises:
      UserError: it is not a number.
    """
    text = metadata.get("ss_network_alpha", "None")
    if text in ("None", ""):
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{source}: ss_network_alpha = {text!r} is not a number.") from error
