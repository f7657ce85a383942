"""Opens a generator by name: a run, a model folder, published weights, or a shipped model.

from focusdpo_jax import pipeline
model = pipeline.open_pipeline("runs/toybox_dpo").load()
"""

import dataclasses

from etils import epath

from focusdpo_jax.checkpoints import pretrained
from focusdpo_jax.config import RunConfig
from focusdpo_jax.models.generator import GeneratorConfig
from focusdpo_jax.training import models, runs

BASE = "base"
SHIPPED = ("toybox", "toybox-leaky")
"""Generators in the package; `BASE` is the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A generator identified by a name. `load` reads its parameters.

    Attributes:
      name: "base", a run folder, a model folder, a folder or file of published weights, or the name
        of a model that ships with the package.
      run: the `runs.Run` if the name is that of a run, otherwise None.
      inpainting: whether the UNet may have more input channels than the latents, as for inpainting.
    """

    name: str
    run: runs.Run | None
    inpainting: bool = False

    @property
    def _model(self) -> str:
        return SHIPPED[0] if self.name == BASE else self.name

    @property
    def shipped(self) -> bool:
        """Whether it is a generator of the package."""
        return _is_shipped(self.name)

    @property
    def config(self) -> RunConfig | None:
        """The configuration of the run; None if it is not a run."""
        return self.run and self.run.config

    @property
    def resolution(self) -> int | None:
        """Side of the training images in pixels; None if it is unknown."""
        if self.run:
            return self.run.config.resolution
        return 64 if self.shipped else None

    def sizes(self) -> GeneratorConfig:
        """Returns the sizes of the generator; reads no weights."""
        if self.run:
            return self.run.sizes()
        return runs.folder_sizes(self._model, inpainting=self.inpainting)

    def load(self) -> models.Model:
        """Loads the generator; for a run, the policy with the newest weights.

        Raises:
          UserError: files are missing or damaged, or the run has no weights yet.
        """
        if self.run:
            return self.run.policy()
        return runs.load_folder(self._model, inpainting=self.inpainting)


def _is_shipped(name: str) -> bool:
    """Returns whether a name is that of a generator of the package; a folder of that name wins."""
    return name == BASE or (name in SHIPPED and not epath.Path(name).exists())


def open_pipeline(name, *, inpainting=False) -> Pipeline:
    """Returns the `Pipeline` of a name.

    Args:
      name: see `Pipeline`.
      inpainting: see `Pipeline`; runs never train such a UNet.

    Raises:
      UserError: the name is neither that of a model nor the folder of a run.
    """
    name = str(name)
    is_model = _is_shipped(name) or pretrained.is_model(name)
    return Pipeline(name=name, run=None if is_model else runs.Run(name), inpainting=inpainting)
