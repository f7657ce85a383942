"""The file layout of IP-Adapter's releases, which diffusers' `load_ip_adapter` reads, both ways.

A file has the image projection under `image_proj.` and the UNet's extra projections under
`ip_adapter.`, numbered 1, 3, 5, ... over all attention layers: encoder, decoder, then the middle
block. Both are translated from and to diffusers' names, which `pytorch_names` maps to our
parameters.

MS-Diffusion's `ms_adapter.bin`, saved as safetensors with the keys of its dicts joined by a dot,
has the same layout with `ms_adapter.` in place of `ip_adapter.`. Its `dummy_image_tokens` are
ignored: its own code attends to them outside all boxes and then multiplies the result by zero.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from focusdpo_jax.checkpoints import pytorch_names, tensor_file
from focusdpo_jax.errors import UserError
from focusdpo_jax.models import stacking
from focusdpo_jax.models.parameters import Params, Path, flatten, unflatten
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig

_PROJECTION = "image_proj."
# Channels of a head in IP-Adapter-Plus's published resamplers; no shape in a file depends on it.
_HEAD_DIM = 64
# Frequencies of a box in MS-Diffusion.
_FREQUENCIES = 8
_STAGES = ("down_blocks", "up_blocks", "mid_block")
# Submodules of a resampler's layer: the name in the file, and in diffusers.
_RESAMPLER = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}
_LAYER = re.compile(r"(layers\.\d+)\.(.*)\.(weight|bias)$")


def is_image_branch(path: Path) -> bool:
    """Returns whether a path in the UNet's tree belongs to the image branch of cross-attention."""
    return path[-2] in ("to_k_ip", "to_v_ip")


def _projections(unet_params: Params) -> Iterator[tuple[str, str]]:
    """Yields pairs of the file's name and diffusers' for the image branch of a UNet's tree."""
    attentions = {
        path[:-2] for path in flatten(stacking.split(unet_params)) if is_image_branch(path)
    }

    def order(path: Path):
        matches = (re.search(r"_(\d+)$", key) for key in path[:-1])
        numbers = [int(match[1]) for match in matches if match]
        stage = next(i for i, name in enumerate(_STAGES) if path[0].startswith(name))
        return stage, numbers

    for i, attention in enumerate(sorted(attentions, key=order)):
        for part in ("to_k_ip", "to_v_ip"):
            yield (
                f"ip_adapter.{2 * i + 1}.{part}.weight",
                pytorch_names.torch_name((*attention, part, "kernel")),
            )


def to_diffusers(
    tensors: Mapping[str, Any], unet_template: Params, source: str = "IP-Adapter file"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an IP-Adapter file into tensors with diffusers' names.

    Args:
      tensors: dict from the file's names to numpy arrays or `LazyTensor`s.
      unet_template: tree of a UNet with an image branch; other leaves are ignored.
      source: name of the file for messages.

    Returns:
      The UNet's image projections, and the subject adapter's tensors: two dicts for
      `pytorch_names.to_flax` (the first together with the other tensors of the UNet).

    Raises:
      UserError: tensors are missing or unexpected.
    """
    tensors = {
        re.sub(r"^ms_adapter\.", "ip_adapter.", name): value
        for name, value in tensors.items()
        if name != "dummy_image_tokens"
    }
    unet, missing, known = {}, [], set()
    for theirs, name in _projections(unet_template):
        known.add(theirs)
        if theirs in tensors:
            unet[name] = tensors[theirs]
        else:
            missing.append(theirs)
    left = sorted(
        name for name in tensors if name not in known and not name.startswith(_PROJECTION)
    )
    pytorch_names.require_fit(source, {"missing": missing, "unexpected": left})
    return unet, image_projection(tensors)


def image_projection(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the subject adapter's tensors of a file with diffusers' names; reads no values."""
    adapter = {}
    for theirs, value in tensors.items():
        if not theirs.startswith(_PROJECTION):
            continue
        name = theirs.removeprefix(_PROJECTION)
        layer = _LAYER.match(name)
        if layer and layer[2] == "0.to_kv":
            both, half = tensor_file.LazyTensor.of(value), value.shape[0] // 2
            adapter[f"{layer[1]}.attn.to_k.weight"] = both.map(lambda x, n=half: x[:n])
            adapter[f"{layer[1]}.attn.to_v.weight"] = both.map(lambda x, n=half: x[n:])
            continue
        if layer and layer[2] in _RESAMPLER:
            name = f"{layer[1]}.{_RESAMPLER[layer[2]]}.{layer[3]}"
        elif name.startswith("proj."):
            name = name.replace("proj.", "image_embeds.")
        adapter[name] = value
    return adapter


def init_image_branch(tensors: Mapping[str, Any], unet_template: Params) -> dict[str, Any]:
    """Initialises an image branch as a copy of the text projections.

    Args:
      tensors: tensors of a UNet, with diffusers' names.
      unet_template: tree of a UNet with an image branch.

    Returns:
      The tensors of the branch with diffusers' names, for every text projection in `tensors`.
    """
    copies = {}
    for _, name in _projections(unet_template):
        of_text = re.sub(r"processor\.(to_[kv])_ip\.0", r"\1", name)
        if of_text in tensors:
            copies[name] = tensors[of_text]
    return copies


def read_config(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], source: str = "IP-Adapter file"
) -> SubjectAdapterConfig:
    """Infers the configuration of an adapter from the shapes and metadata of a file.

    Args:
      tensors: dict from the file's names to anything with a shape.
      metadata: metadata of the file. Published files have none: then an attention head has 64
        channels, and dropped references are "blank", or "absent" for MS-Diffusion.
      source: name of the file for messages.

    Raises:
      UserError: the file is not an adapter of any supported kind.
    """
    shapes = {name.removeprefix(_PROJECTION): value.shape for name, value in tensors.items()}
    dropped = metadata.get("dropped", "blank")
    try:
        if "proj.weight" in shapes:
            (output_dim,), (rows, input_dim) = shapes["norm.weight"], shapes["proj.weight"]
            return SubjectAdapterConfig(
                kind="projection",
                input_dim=input_dim,
                output_dim=output_dim,
                num_tokens=rows // output_dim,
                dropped=dropped,
            )
        head_dim = int(metadata.get("head_dim", _HEAD_DIM))
        latents = shapes.get("latents")
        own: dict[str, Any] = {"dropped": dropped}
        if "grounding_latents" in shapes:
            latents = shapes["grounding_latents"]
            frequencies = int(metadata.get("frequencies", _FREQUENCIES))
            own = {
                "kind": "grounding",
                "dropped": metadata.get("dropped", "absent"),
                "frequencies": frequencies,
                "phrase_dim": shapes["latent_proj.0.weight"][1] - 8 * frequencies,
            }
        elif latents is None:
            raise KeyError("latents")
        width, input_dim = shapes["proj_in.weight"]
        layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
        return SubjectAdapterConfig(
            input_dim=input_dim,
            output_dim=shapes["proj_out.weight"][0],
            num_tokens=latents[1],
            width=width,
            depth=len(layers),
            num_heads=shapes["layers.0.0.to_q.weight"][0] // head_dim,
            head_dim=head_dim,
            expansion=shapes["layers.0.1.1.weight"][0] // width,
            **own,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source} is neither of IP-Adapter's layout nor of IP-Adapter-Plus's or "
            f"MS-Diffusion's ({error})."
        ) from error


def write_config(config: SubjectAdapterConfig) -> dict[str, str]:
    """Returns the metadata for `read_config`: the fields that shapes do not determine."""
    names = {"projection": (), "resampler": ("head_dim",), "grounding": ("head_dim", "frequencies")}
    return {name: str(getattr(config, name)) for name in ("dropped", *names[config.kind])}


def diffusers_mismatch(config: SubjectAdapterConfig) -> str | None:
    """Returns why diffusers' `load_ip_adapter` would misread an adapter, or None if it does not.

    diffusers assumes four layers, heads of 64 channels and a fourfold feed-forward, and four tokens
    per pooled embedding.
    """
    if config.kind == "grounding":
        return "the subject adapter is MS-Diffusion's"
    fixed = (
        {"depth": 4, "head_dim": _HEAD_DIM, "expansion": 4}
        if config.kind == "resampler"
        else {"num_tokens": 4}
    )
    wrong = [
        f"{name} = {getattr(config, name)} (not {value})"
        for name, value in fixed.items()
        if getattr(config, name) != value
    ]
    return f"the subject adapter has {', '.join(wrong)}" if wrong else None


def from_flax(unet_params: Params, adapter_params: Params) -> dict[str, np.ndarray]:
    """Converts the parameters of a UNet and a subject adapter to an IP-Adapter file.

    Args:
      unet_params: a tree with the image branch; other leaves are ignored.
      adapter_params: parameters of any of the modules in `models.subject_adapter`.

    Returns:
      dict from the file's names to numpy arrays.
    """
    flat = flatten(unet_params)
    branch = pytorch_names.from_flax(
        unflatten({path: leaf for path, leaf in flat.items() if is_image_branch(path)})
    )
    tensors = {theirs: branch[name] for theirs, name in _projections(unet_params)}
    adapter = pytorch_names.from_flax(adapter_params)
    back = {ours: theirs for theirs, ours in _RESAMPLER.items()}
    for name, value in adapter.items():
        layer = _LAYER.match(name)
        if layer and layer[2] == "attn.to_k":
            name = f"{layer[1]}.0.to_kv.weight"
            value = np.concatenate([value, adapter[f"{layer[1]}.attn.to_v.weight"]])
        elif layer and layer[2] == "attn.to_v":
            continue
        elif layer:
            name = f"{layer[1]}.{back[layer[2]]}.{layer[3]}"
        elif name.startswith("image_embeds."):
            name = name.replace("image_embeds.", "proj.")
        tensors[_PROJECTION + name] = value
    return tensors
