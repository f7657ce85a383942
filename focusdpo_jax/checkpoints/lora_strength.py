"""The scale of a file's low-rank updates (LoRA), where its tensors do not contain it.

Three places beside the `.alpha` tensors of kohya's files hold alpha and rank:

    lora_adapter_metadata   in the header of a safetensors file that diffusers wrote: JSON of PEFT's
                            `LoraConfig`, its fields under "unet.", "text_encoder." and so on
    adapter_config.json     beside PEFT's adapter_model.safetensors: the same fields, of one model
    ss_network_alpha        in the header of kohya's files, whose tensors repeat it for every layer

PEFT (huggingface/peft, `LoraModel._create_and_replace`) scales an update by alpha / rank, or by
alpha / sqrt(rank) where `use_rslora`. `rank_pattern` and `alpha_pattern` give layers values of their own:
the first key that matches as the regular expression "(.*\\.)?(KEY)$" from the start of the layer's name.
"""

import dataclasses
import json
import math
import re

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import read_json

HEADER = "lora_adapter_metadata"
CONFIG = "adapter_config.json"
# What PEFT takes where a file is silent.
_RANK, _ALPHA = 8, 8
# Fields of PEFT that change what the layers compute, in other ways than by a low-rank update, with the
# values that leave it at one.
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
# Initialisations that also change the base's weights, which a file of updates does not hold.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's `LoraConfig` that decide the strength of a layer's update.

    Attributes:
      rank, alpha: of layers that no pattern names.
      rank_pattern, alpha_pattern: {regular expression: value}, of which the first match counts.
      root: whether alpha is divided by the root of the rank (rsLoRA, arXiv 2312.03732).
      source: what to call the file in a message.
    """

    rank: int = _RANK
    alpha: float = _ALPHA
    rank_pattern: dict = dataclasses.field(default_factory=dict)
    alpha_pattern: dict = dataclasses.field(default_factory=dict)
    root: bool = False
    source: str = CONFIG

    @classmethod
    def of(cls, fields, source):
        """Reads a dict of PEFT's fields.

        Raises:
          UserError: one of them asks for more than low-rank updates, or makes no sense.
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
                f"{source} asks for more than low-rank updates: {', '.join(other)}. Only "
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

    def scale(self, layer, rank):
        """The factor of a layer's update.

        Args:
          layer: its name in the model that was trained, such as "mid_block.attentions.0.proj_in".
          rank: of its matrices.

        Raises:
          UserError: the configuration has another rank for it, so that it belongs to another file.
        """
        stated = self._of(self.rank_pattern, layer, self.rank)
        if stated != rank:
            raise UserError(
                f"{self.source} says rank {stated} for {layer}, whose matrices have rank "
                f"{rank}: they do not belong together."
            )
        alpha = self._of(self.alpha_pattern, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def _of(self, pattern, layer, value):
        for key, own in pattern.items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return own
        return value


def _items(pattern, name, source):
    """Pairs of a pattern whose keys are regular expressions."""
    if not isinstance(pattern, dict):
        raise UserError(f"{source}: {name} = {pattern!r}: give an object of layers and values.")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(
                f"{source}: {name}[{key!r}] is no regular expression ({error})."
            ) from error
    return pattern.items()


def of_folder(folder):
    """The `AdapterConfig` of the adapter_config.json in a folder of PEFT, an `epath.Path`.

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


def of_header(metadata, parts, source):
    """{part: AdapterConfig} of what diffusers wrote into a file's header; empty where it did not.

    Args:
      metadata: the header's, a dict of texts.
      parts: names of the parts that the file may update. Fields without a part's name are the UNet's, as
        `UNet2DConditionModel.save_lora_adapter` writes them.
      source: what to call the file in a message.

    Raises:
      UserError: it is damaged or unsupported.
    """
    if HEADER not in metadata:
        return {}
    source = f"{HEADER} of {source}"
    try:
        fields = json.loads(metadata[HEADER])
    except ValueError as error:
        raise UserError(f"{source} is damaged: {error}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{source} is damaged: it is no JSON object.")
    by_part = {}
    for name, value in fields.items():
        part, dot, field = name.partition(".")
        part, field = (part, field) if dot and part in parts else ("unet", name)
        by_part.setdefault(part, {})[field] = value
    return {part: AdapterConfig.of(values, source) for part, values in by_part.items()}


def kohya_alpha(metadata, source):
    """`ss_network_alpha` of a kohya file's header, or None where there is none.

    Raises:
      UserError: it is no number.
    """
    text = metadata.get("ss_network_alpha", "None")
    if text in ("None", ""):
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{source}: ss_network_alpha = {text!r} is no number.") from error
