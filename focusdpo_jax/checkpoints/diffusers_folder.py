"""Reads and writes an SDXL pipeline in the folder layout of diffusers.

    model_index.json            class of each part
    unet/, vae/                 config.json, diffusion_pytorch_model[.fp16].safetensors
    text_encoder/, text_encoder_2/, image_encoder/
                                config.json, model[.fp16].safetensors (transformers' layout)
    tokenizer/, tokenizer_2/    vocab.json and merges.txt, or tokenizer.json, of CLIP's tokenizer
    scheduler/                  scheduler_config.json
    ip_adapter.safetensors      subject adapter and image branch, IP-Adapter's layout (our addition)

Weights may be sharded, with an index.json. Reading holds at most one tensor besides those that are
already placed. If `ip_adapter.safetensors` is missing, the UNet gets a new adapter.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from focusdpo_jax.checkpoints import (
    diffusers_configs,
    ip_adapter,
    pytorch_names,
    tensor_file,
    weight_files,
)
from focusdpo_jax.errors import MissingFiles, UserError
from focusdpo_jax.files import read_json, replace_file
from focusdpo_jax.models import clip, vocabulary
from focusdpo_jax.models.generator_config import GeneratorConfig, check_parts
from focusdpo_jax.models.parameters import Params, Path, flatten, unflatten
from focusdpo_jax.models.subject_adapter import SubjectAdapterConfig
from focusdpo_jax.models.tokenizer import Tokenizer

ADAPTER = "ip_adapter.safetensors"
_CLASS = "StableDiffusionXLPipeline"
# Name of each part's weight file, without its ending.
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "image_encoder": "model",
}
_READERS = {
    "unet": diffusers_configs.read_unet,
    "vae": diffusers_configs.read_vae,
    "text_encoder": diffusers_configs.read_clip_text,
    "text_encoder_2": diffusers_configs.read_clip_text,
    "image_encoder": diffusers_configs.read_clip_vision,
}
FETCH = (
    "Such a folder is normally fetched by `hf download stabilityai/stable-diffusion-xl-base-1.0 "
    "--local-dir DIR`, its image_encoder/ is models/image_encoder/ of h94/IP-Adapter, and "
    f"{ADAPTER}, which may be left out, is sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors of "
    "the same. Give config.model.pretrained=DIR of a folder that has them, or "
    "config.model.image_encoder, config.model.adapter and config.model.tokenizer where they lie "
    "elsewhere."
)
# The image encoders of IP-Adapter's releases.
PAIRS = (
    "Of h94/IP-Adapter, sdxl_models/ip-adapter*_vit-h.safetensors were trained with "
    "models/image_encoder, and sdxl_models/ip-adapter_sdxl.safetensors with "
    "sdxl_models/image_encoder."
)
# A repository and an optional path in it.
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?$")


def is_pipeline(folder: epath.PathLike) -> bool:
    """Returns whether a folder is a diffusers pipeline."""
    return (epath.Path(folder) / "model_index.json").exists()


def resolve(name: epath.PathLike) -> epath.Path | None:
    """Resolves a path or a hub id to a local file or folder; None if there is none.

    Args:
      name: a path, or a hub id with an optional path in the repository, such as
        h94/IP-Adapter/models/image_encoder, that is in the hub's cache. Nothing is downloaded.
    """
    if epath.Path(name).exists():
        return epath.Path(name)
    match = _HUB_NAME.match(str(name))
    if match:
        import huggingface_hub  # Only needed here.

        try:
            cached = epath.Path(huggingface_hub.snapshot_download(match[1], local_files_only=True))
        except (OSError, ValueError):
            return None  # Not in the hub's cache.
        path = cached / match[2] if match[2] else cached
        if path.exists():
            return path
    return None


def files_of(folder: epath.PathLike, part: str) -> list[epath.Path]:
    """Returns the safetensors files of a part in its folder; see `weight_files.find`."""
    return weight_files.find(epath.Path(folder), _STEMS[part])


def missing_files(
    folders: Mapping[str, epath.Path],
    tokenizer: epath.Path,
    base: epath.PathLike = "",
    variant: str | None = None,
) -> list[str]:
    """Returns the paths of required files of a generator that do not exist.

    Args:
      folders: {part: its folder}.
      tokenizer: folder of the vocabulary.
      base: folder; paths below it are returned relative to it.
      variant: see `weight_files.find`.
    """
    missing = [
        str(folder / "config.json")
        for folder in folders.values()
        if not (folder / "config.json").exists()
    ]
    for part, folder in folders.items():
        missing += weight_files.missing(folder, _STEMS[part], variant)
    missing += vocabulary.missing(tokenizer)
    return [path.removeprefix(f"{base}/") for path in missing]


def part_folders(
    folder: epath.PathLike, image_encoder: epath.PathLike | None = None
) -> dict[str, epath.Path]:
    """Returns {part: folder} of a pipeline.

    Args:
      folder: folder of the pipeline.
      image_encoder: folder of the image encoder; None for the pipeline's own.
    """
    folders = {part: epath.Path(folder) / part for part in _STEMS}
    return folders | ({"image_encoder": epath.Path(image_encoder)} if image_encoder else {})


def load_config(
    folder: epath.PathLike,
    variant: str | None = None,
    *,
    adapter: epath.Path | None = None,
    image_encoder: epath.PathLike | None = None,
    tokenizer: epath.PathLike | None = None,
) -> GeneratorConfig:
    """Reads the configuration of a pipeline.

    Args:
      folder: folder of the pipeline.
      variant: see `weight_files.find`.
      adapter: an IP-Adapter file to use instead of the folder's own.
      image_encoder, tokenizer: folders to use instead of the folder's own.

    Raises:
      UserError: files are missing or damaged, or the model is not SDXL.
    """
    folder = epath.Path(folder)
    index = folder / "model_index.json"
    index = read_json(index) if index.exists() else {}
    _require_sdxl(folder, index)
    folders = part_folders(folder, image_encoder)
    missing = missing_files(folders, epath.Path(tokenizer or folder / "tokenizer"), folder, variant)
    if missing:
        raise MissingFiles(f"{folder} lacks {', '.join(missing)}. {FETCH}")
    parts = {part: read_part_config(folders[part], part) for part in _READERS}
    scheduler, noise = folder / "scheduler" / "scheduler_config.json", {}
    if scheduler.exists():
        # The class in model_index.json takes precedence over the one in the scheduler's own file.
        named = index.get("scheduler") or ()
        named = {"_class_name": named[1]} if len(named) > 1 and isinstance(named[1], str) else {}
        noise = _read_config(
            scheduler,
            lambda values, source: diffusers_configs.read_scheduler({**values, **named}, source),
        )
    parts["unet"] = dataclasses.replace(parts["unet"], image_context=True)
    try:
        check_parts(**{name: config for name, config in parts.items() if name != "image_encoder"})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    # True is diffusers' default.
    zeros = index.get("force_zeros_for_empty_prompt", True)
    return generator_config(
        parts,
        adapter or folder / ADAPTER,
        folders["image_encoder"],
        zero_empty_prompt=zeros,
        **noise,
    )


def _require_sdxl(folder: epath.Path, index: Mapping[str, Any]) -> None:
    """Raises a UserError if a model_index.json describes another kind of pipeline."""
    name = index.get("_class_name", _CLASS)
    if _CLASS.removesuffix("Pipeline") not in str(name):
        raise UserError(
            f"{folder} is a {name} according to its model_index.json, and only SDXL is supported: "
            f"give the folder of a {_CLASS}"
        )
    absent = [
        part
        for part in _STEMS
        if part != "image_encoder"
        and (index.get(part, True) is None or index.get(part) == [None, None])
    ]
    if absent:
        refiner = " (SDXL's refiner has no first one)" if absent == ["text_encoder"] else ""
        raise UserError(
            f"{folder} has no {' and no '.join(absent)}{refiner} according to its "
            "model_index.json: give the folder of an SDXL base model, which has both text encoders"
        )


def generator_config(
    parts: Mapping[str, Any],
    adapter: epath.Path | None,
    image_encoder: epath.PathLike,
    **others: Any,
) -> GeneratorConfig:
    """Builds the configuration of parts and a subject adapter.

    Args:
      parts: {part: configuration} of all parts except the adapter.
      adapter: path of an IP-Adapter file, which need not exist; see `adapter_config`.
      image_encoder: folder of the image encoder, for the message.
      others: other fields of `GeneratorConfig`.

    Raises:
      UserError: the adapter was trained with another image encoder or another UNet.
    """
    read = adapter_config(adapter, parts)
    try:
        return GeneratorConfig(**parts, adapter=read, **others)
    except UserError as error:
        raise UserError(
            f"{adapter} does not fit the model with the image encoder {image_encoder}: "
            f"{error}. {PAIRS} Set config.model.adapter and config.model.image_encoder "
            "to two that belong together."
        ) from error


def read_part_config(folder: epath.Path, part: str) -> Any:
    """Reads the configuration of a part from its folder."""
    return _read_config(folder / "config.json", _READERS[part])


def adapter_config(file: epath.Path | None, parts: Mapping[str, Any]) -> SubjectAdapterConfig:
    """Returns the configuration of an IP-Adapter file, or of a new adapter if there is no file.

    Args:
      file: path of the file, or None.
      parts: {part: configuration} with the image encoder and the UNet.
    """
    if file is not None and file.exists():
        return ip_adapter.read_config(*tensor_file.read(file), str(file))
    return SubjectAdapterConfig(
        input_dim=parts["image_encoder"].hidden_size,
        output_dim=parts["unet"].cross_attention_dim,
        dropped="blank",
    )


def open_part(
    folder: epath.PathLike,
    part: str,
    example: Params,
    *,
    adapter: epath.PathLike | None = None,
    image_encoder: epath.PathLike | None = None,
    variant: str | None = None,
) -> dict[Path, tensor_file.LazyTensor] | None:
    """Finds the tensors of one part and checks their names and shapes; only headers are read.

    The image branch of the UNet is read from the IP-Adapter file. Without one it is initialised as
    a copy of the text projections, as in IP-Adapter's own training.

    Args:
      folder: folder of the pipeline.
      part: one of `generator.PARTS`.
      example: the expected tree of arrays or `jax.ShapeDtypeStruct`s, without "params".
      adapter, image_encoder: see `load_config`.
      variant: see `weight_files.find`.

    Returns:
      {path in `stacking.split(example)`: LazyTensor}, for `tensor_file.load`; None for "adapter"
      if there is no such file.

    Raises:
      UserError: a file is damaged, or tensors are missing, unexpected or of another shape; it names
        all of them.
    """
    file = epath.Path(adapter or epath.Path(folder) / ADAPTER)
    if part == "adapter":
        return open_adapter(file, example) if file.exists() else None
    folder = part_folders(folder, image_encoder)[part]
    tensors = read_tensors(folder, part, variant)
    if part == "unet" and file.exists():
        tensors |= ip_adapter.to_diffusers(tensor_file.read(file)[0], example, str(file))[0]
    elif part == "unet":
        tensors |= ip_adapter.init_image_branch(tensors, example)
    return pytorch_names.fit(tensors, example, str(folder))


def load_part(
    folder: epath.PathLike,
    part: str,
    example: Params,
    *,
    dtype: Any = None,
    sharding: Any = None,
    **files: Any,
) -> dict[str, Any] | None:
    """Reads one part, tensor by tensor.

    Args:
      folder, part, example, files: see `open_part`.
      dtype, sharding: see `tensor_file.placement`.

    Returns:
      A tree like `example` of numpy arrays or, with a sharding, of jax arrays; None for "adapter"
      if there is no such file.

    Raises:
      UserError: see `open_part`.
    """
    return tensor_file.load(open_part(folder, part, example, **files), example, dtype, sharding)


def read_tensors(
    folder: epath.PathLike, part: str, variant: str | None = None
) -> dict[str, tensor_file.LazyTensor]:
    """Returns {name: LazyTensor} of a part; see `weight_files.read`."""
    return weight_files.read(folder, _STEMS[part], variant)


def open_adapter(file: epath.PathLike, example: Params) -> dict[Path, tensor_file.LazyTensor]:
    """Finds the tensors of the subject adapter in an IP-Adapter file; see `pytorch_names.fit`."""
    tensors = ip_adapter.image_projection(tensor_file.read(file)[0])
    return pytorch_names.fit(tensors, example, str(file))


def save_part(
    folder: epath.PathLike,
    part: str,
    parameters: Params,
    config: GeneratorConfig,
    resolution: int,
) -> None:
    """Writes one part in the layout of diffusers (or transformers).

    The image branch and the low-rank updates of the UNet are not written: they have files of
    their own (`save_adapter`, `lora.save`).

    Args:
      folder: folder of the pipeline.
      part: one of `generator.PARTS`, but not "adapter".
      parameters: tree of the part.
      config: configuration of the generator.
      resolution: side in pixels of the images that pipelines generate by default.

    Raises:
      UserError: diffusers does not support a model of these sizes.
    """
    part_config = getattr(config, part)
    if part == "unet":
        written = diffusers_configs.write_unet(part_config, resolution // config.vae.factor)
        parameters = unflatten(
            {
                path: leaf
                for path, leaf in flatten(parameters).items()
                if path[-1] not in ("lora_a", "lora_b") and not ip_adapter.is_image_branch(path)
            }
        )
    elif part == "vae":
        written = diffusers_configs.write_vae(part_config, resolution)
    elif part == "image_encoder":
        written = diffusers_configs.write_clip_vision(part_config)
    else:
        written = diffusers_configs.write_clip_text(part_config)
    folder = epath.Path(folder) / part
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", written)
    tensor_file.write(folder / f"{_STEMS[part]}.safetensors", pytorch_names.lay_out(parameters))


def save_adapter(folder: epath.PathLike, parameters: Params, config: GeneratorConfig) -> None:
    """Writes the subject adapter and the UNet's image branch for `pipe.load_ip_adapter`.

    Args:
      folder: folder to write to.
      parameters: {part: tree} with "unet" and "adapter".
      config: configuration of the generator.
    """
    tensors = ip_adapter.from_flax(parameters["unet"], parameters["adapter"])
    tensor_file.write(
        epath.Path(folder) / ADAPTER, tensors, ip_adapter.write_config(config.adapter)
    )


def save_pipeline_files(
    folder: epath.PathLike, config: GeneratorConfig, tokenizer: Tokenizer
) -> None:
    """Writes the files of a pipeline besides its parts: index, scheduler, tokenizers, preprocessor.

    Args:
      folder: folder of the pipeline.
      config: configuration of the generator.
      tokenizer: tokenizer of the generator.
    """
    folder = epath.Path(folder)
    for name, padding in zip(("tokenizer", "tokenizer_2"), tokenizer.pad_tokens):
        tokenizer.save(folder / name)
        special = {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": padding,
        }
        _write_json(
            folder / name / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, **special},
        )
        _write_json(folder / name / "special_tokens_map.json", special)
    size = config.image_encoder.image_size
    for name, file, values in (
        ("scheduler", "scheduler_config.json", diffusers_configs.write_scheduler(config)),
        (
            "feature_extractor",
            "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": size},
                "do_center_crop": True,
                "crop_size": {"height": size, "width": size},
                "do_convert_rgb": True,
                "do_rescale": True,
                "do_normalize": True,
                "resample": 3,
                "image_mean": clip.MEAN,
                "image_std": clip.DEVIATION,
            },
        ),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write_json(folder / name / file, values)
    projected = {
        part: "WithProjection" if getattr(config, part).projection_dim else ""
        for part in ("text_encoder", "text_encoder_2", "image_encoder")
    }
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": _CLASS,
            "force_zeros_for_empty_prompt": config.zero_empty_prompt,
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel" + projected["text_encoder"]],
            "text_encoder_2": ["transformers", "CLIPTextModel" + projected["text_encoder_2"]],
            "image_encoder": ["transformers", "CLIPVisionModel" + projected["image_encoder"]],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
        },
    )


def _read_config(path: epath.Path, read: Callable[[Mapping[str, Any], str], Any]) -> Any:
    """Converts a JSON file with `read`; missing or malformed fields become UserErrors."""
    values = read_json(path)
    try:
        return read(values, str(path))
    except KeyError as error:
        raise UserError(f"{path} lacks the field {error}.") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error


def _write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
