"""The model that a run starts from, in whichever layout its files are.

    a folder of ours            model_folder
    a diffusers SDXL folder     diffusers_folder
    one SDXL file               single_file

A subject adapter, an image encoder and a tokenizer may lie elsewhere than the rest: they are what
SDXL's own releases lack.
"""

import dataclasses

from etils import epath

from focusdpo_jax.checkpoints import (
    diffusers_folder,
    model_folder,
    single_file,
    tensor_file,
)
from focusdpo_jax.errors import MissingFiles, UserError
from focusdpo_jax.models import vocabulary

_OWN = "toybox"  # Ships with this package.


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Where a model lies.

    Attributes:
      path: folder or file.
      adapter: IP-Adapter file, or None for the folder's own or a new one.
      image_encoder: folder of it, or None for the folder's own.
      tokenizer: folder of it.
      prediction_type: what the UNet predicts, one of `single_file.PREDICTION_TYPES`, in the place of
        what the files say; "" is what they say.
    """

    path: epath.Path
    adapter: epath.Path | None
    image_encoder: epath.Path | None
    tokenizer: epath.Path | None
    prediction_type: str = ""

    @property
    def _pieces(self):
        return {"adapter": self.adapter, "image_encoder": self.image_encoder}

    @property
    def fillers(self):
        """What fills up captions; a tokenizer that lies elsewhere does not decide it."""
        own = self.tokenizer == self.path / "tokenizer"
        return vocabulary.fillers(self.path) if own else vocabulary.FILLERS

    @property
    def layout(self):
        """The module that reads it."""
        if self.path.is_file():
            return single_file
        return diffusers_folder if diffusers_folder.is_one(self.path) else model_folder

    def config(self):
        """The `GeneratorConfig`.

        Raises:
          UserError: files are missing or damaged, or it is no SDXL.
        """
        if self.layout is model_folder:
            return model_folder.load_config(self.path)
        if self.layout is single_file:
            return single_file.load_config(
                self.path,
                tokenizer=self.tokenizer,
                prediction_type=self.prediction_type,
                **self._pieces,
            )
        config = diffusers_folder.load_config(self.path, tokenizer=self.tokenizer, **self._pieces)
        if self.prediction_type:
            config = dataclasses.replace(config, **single_file.prediction(self.prediction_type))
        return config

    def files(self, part):
        """Paths of the safetensors files that a part is read from; none where it has to be made."""
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

    def open_part(self, part, example, *, config):
        """Checks the headers of one part's files; None where the part has to be made.

        Args:
          config: that of `config()`.

        See `diffusers_folder.open_part` for the other arguments and errors.
        """
        if self.layout is model_folder:
            return model_folder.open_part(self.path, part, example)
        if self.layout is single_file:
            return single_file.open_part(
                self.path, part, example, getattr(config, part), **self._pieces
            )
        return diffusers_folder.open_part(self.path, part, example, **self._pieces)

    def load_part(self, part, example, *, config, dtype=None, sharding=None):
        """Reads one part, or returns None where it has to be made.

        See `open_part` and `tensor_file.placement` for the arguments and errors.
        """
        return tensor_file.load(
            self.open_part(part, example, config=config), example, dtype, sharding
        )


def is_model(path):
    """Whether a path is a model by itself, in one of the layouts, and not the folder of a run."""
    path = epath.Path(path)
    return (path / "model.json").exists() or diffusers_folder.is_one(path) or path.is_file()


def locate(fields, shipped, prediction_type=""):
    """Finds the files of a configuration.

    Args:
      fields: {"pretrained", "adapter", "image_encoder", "tokenizer": what config.model says}: a
        path, or a hub id (with a path in it, if need be) of what was fetched before. Nothing is
        downloaded; an empty text takes the model's own.
      shipped: function of a name to the folder of a model that comes with the package.
      prediction_type: config.model.prediction_type, see `Pretrained`.

    Raises:
      UserError: it lists everything that is not there, and where it is normally fetched.
    """
    found, problems = {}, []
    for field, name in fields.items():
        found[field] = diffusers_folder.find(name) if name else None
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
    pretrained = Pretrained(found.pop("pretrained"), **found)
    path, given = pretrained.path, [field for field in found if found[field] is not None]
    if prediction_type:
        fields, given = fields | {"prediction_type": prediction_type}, [*given, "prediction_type"]
        pretrained = dataclasses.replace(pretrained, prediction_type=prediction_type)
    if pretrained.layout is model_folder and given:
        raise UserError(
            f"config.model.{given[0]} = {fields[given[0]]!r}: {path} is a model "
            "folder, which has everything; give ''"
        )
    if pretrained.tokenizer is None and path.is_dir():
        pretrained = dataclasses.replace(pretrained, tokenizer=path / "tokenizer")
    return pretrained
