"""Opens pretrained models in any supported layout.

    our own folder              model_folder
    a diffusers SDXL folder     diffusers_folder
    a single SDXL file          single_file

The subject adapter, the image encoder and the tokenizer may have paths of their own, since SDXL's
releases do not contain the first two, and single files none of the three.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from etils import epath

from focusdpo_jax.checkpoints import (
    diffusers_folder,
    model_folder,
    single_file,
    tensor_file,
)
from focusdpo_jax.errors import MissingFiles, UserError
from focusdpo_jax.models import vocabulary
from focusdpo_jax.models.generator_config import GeneratorConfig
from focusdpo_jax.models.parameters import Params, Path

_OWN = "toybox"  # Ships with this package.


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The files of a pretrained model.

    Attributes:
      path: folder or file of the model.
      adapter: IP-Adapter file, or None for the folder's own or a new adapter.
      image_encoder: folder of the image encoder, or None for the model's own.
      tokenizer: folder of the tokenizer.
      prediction_type: one of `single_file.PREDICTION_TYPES`, which overrides the files', or "" for
        that of the files.
    """

    path: epath.Path
    adapter: epath.Path | None
    image_encoder: epath.Path | None
    tokenizer: epath.Path | None
    prediction_type: str = ""

    @property
    def _overrides(self) -> dict[str, epath.Path | None]:
        return {"adapter": self.adapter, "image_encoder": self.image_encoder}

    @property
    def pad_tokens(self) -> tuple[str, ...]:
        """The pad token of each text encoder: the model's, or SDXL's for another tokenizer."""
        own = self.tokenizer == self.path / "tokenizer"
        return vocabulary.pad_tokens(self.path) if own else vocabulary.PAD_TOKENS

    @property
    def layout(self) -> ModuleType:
        """The module that reads this layout."""
        if self.path.is_file():
            return single_file
        return diffusers_folder if diffusers_folder.is_pipeline(self.path) else model_folder

    def config(self) -> GeneratorConfig:
        """Reads the configuration.

        Raises:
          UserError: files are missing or damaged, or the model is not SDXL.
        """
        if self.layout is model_folder:
            return model_folder.load_config(self.path)
        if self.layout is single_file:
            return single_file.load_config(
                self.path,
                tokenizer=self.tokenizer,
                prediction_type=self.prediction_type,
                **self._overrides,
            )
        config = diffusers_folder.load_config(
            self.path, tokenizer=self.tokenizer, **self._overrides
        )
        if self.prediction_type:
            config = dataclasses.replace(config, **single_file.prediction(self.prediction_type))
        return config

    def files(self, part: str) -> list[epath.Path]:
        """Returns the safetensors files of a part; none if it has to be initialised."""
        if self.layout is model_folder:
            return [path for path in [self.path / f"{part}.safetensors"] if path.exists()]
        adapter = self.adapter
        if adapter is None and self.layout is diffusers_folder:
            adapter = self.path / diffusers_folder.ADAPTER
        adapter = [adapter] if adapter is not None and adapter.exists() else []
        if part == "adapter":
            return adapter
        if self.layout is single_file and part != "image_encoder":
            own = [self.path]
        else:
            folders = diffusers_folder.part_folders(self.path, self.image_encoder)
            own = diffusers_folder.files_of(folders[part], part)
        return own + adapter if part == "unet" else own  # Its image branch is the adapter's.

    def open_part(
        self, part: str, example: Params, *, config: GeneratorConfig
    ) -> dict[Path, tensor_file.LazyTensor] | None:
        """Checks the headers of one part's files.

        Args:
          part, example: see `diffusers_folder.open_part`.
          config: the result of `config()`.

        Returns:
          {path: LazyTensor}; None if the part has to be initialised.

        Raises:
          UserError: see `diffusers_folder.open_part`.
        """
        if self.layout is model_folder:
            return model_folder.open_part(self.path, part, example)
        if self.layout is single_file:
            return single_file.open_part(
                self.path, part, example, getattr(config, part), **self._overrides
            )
        return diffusers_folder.open_part(self.path, part, example, **self._overrides)

    def load_part(
        self,
        part: str,
        example: Params,
        *,
        config: GeneratorConfig,
        dtype: Any = None,
        sharding: Any = None,
    ) -> dict[str, Any] | None:
        """Reads one part; returns None if it has to be initialised.

        See `open_part` and `tensor_file.placement` for the arguments and errors.
        """
        return tensor_file.load(
            self.open_part(part, example, config=config), example, dtype, sharding
        )


def is_model(path: epath.PathLike) -> bool:
    """Returns whether a path is a model in one of the layouts, and not the folder of a run."""
    path = epath.Path(path)
    return (path / "model.json").exists() or diffusers_folder.is_pipeline(path) or path.is_file()


def locate(
    fields: Mapping[str, str],
    shipped: Callable[[str], epath.Path],
    prediction_type: str = "",
) -> Pretrained:
    """Resolves the fields of `config.model` to files.

    Args:
      fields: the values of `pretrained`, `adapter`, `image_encoder` and `tokenizer` in
        `config.model`: each a path, a hub id with an optional path in the repository
        (see `diffusers_folder.resolve`), or "" for the model's own. Nothing is downloaded.
      shipped: function from a name to the folder of a model that ships with the package.
      prediction_type: config.model.prediction_type, see `Pretrained`.

    Raises:
      UserError: files are missing; it lists all of them, and where they are published.
    """
    found, problems = {}, []
    for field, name in fields.items():
        found[field] = diffusers_folder.resolve(name) if name else None
        if field == "pretrained" and "/" not in name and shipped(name).exists():
            found[field] = shipped(name)
        if name and found[field] is None:
            problems.append(
                f"config.model.{field} = {name!r}: no such file or folder, nor in the "
                "hub's cache of this machine"
            )
    if problems:
        raise MissingFiles(
            f"{'; '.join(problems)}. {diffusers_folder.FETCH} (Or give {_OWN!r}, "
            "which ships with this package.)"
        )
    path = found.pop("pretrained")
    assert path is not None, "config.model.pretrained is not empty here"
    pretrained = Pretrained(path, **found)
    given = [field for field in found if found[field] is not None]
    if prediction_type:
        fields = {**fields, "prediction_type": prediction_type}
        given.append("prediction_type")
        pretrained = dataclasses.replace(pretrained, prediction_type=prediction_type)
    if pretrained.layout is model_folder and given:
        raise UserError(
            f"config.model.{given[0]} = {fields[given[0]]!r}: {path} is a model "
            "folder, which has everything; give ''"
        )
    if pretrained.tokenizer is None and path.is_dir():
        pretrained = dataclasses.replace(pretrained, tokenizer=path / "tokenizer")
    return pretrained
