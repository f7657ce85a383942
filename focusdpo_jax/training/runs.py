"""Loads the models of finished and unfinished runs: the policy and the base model."""

import dataclasses

import jax
from absl import logging
from etils import epath

from focusdpo_jax import config as config_lib
from focusdpo_jax import objectives
from focusdpo_jax.checkpoints import run_folder
from focusdpo_jax.errors import UserError
from focusdpo_jax.models.generator import merge_parameters, split_parameters
from focusdpo_jax.training import models
from focusdpo_jax.training.checkpointing import Checkpoints
from focusdpo_jax.training.state import create_state, make_optimizer


def load_folder(name, *, inpainting=False):
    """Loads a `Model` from a folder, or one that ships with the package.

    Args:
      name: value of `config.model.pretrained`: a folder, or the name of a shipped model.
      inpainting: whether the UNet may have more input channels than the latents, as for inpainting.

    Raises:
      UserError: see `models.load_model`.
    """
    return models.load_model(_config_of(name), inpainting=inpainting)


def _config_of(name):
    model = config_lib.ModelConfig(pretrained=str(name), remat=False, scan_layers=True)
    return config_lib.RunConfig(dtype="float32", model=model)


def folder_sizes(name, *, inpainting=False):
    """Returns the `GeneratorConfig` of the model that `load_folder` loads; reads no weights."""
    return models.generator_config(_config_of(name), inpainting=inpainting)


class Run:
    """A run folder, opened for reading.

    Attributes:
      config: the RunConfig of the run.
    """

    def __init__(self, workdir):
        """Reads the configuration of the run in `workdir`.

        Raises:
          UserError: the folder is not that of a run.
        """
        self._workdir = epath.Path(workdir)
        self.config = config_lib.parse_saved(run_folder.read_config(workdir))

    def base(self):
        """Loads the `Model` from which the run started."""
        return models.load_model(self.config)

    def sizes(self):
        """Returns the `GeneratorConfig` of `policy`; reads no weights."""
        folder = self.check_policy().folder
        return models.generator_config(self.config) if folder is None else folder_sizes(folder)

    def policy(self):
        """Loads the trained `Model` with the newest weights.

        These are in `model/` of a finished run, and in the newest checkpoint of an unfinished one;
        see `run_folder.newest_weights`.

        Raises:
          UserError: the run has no weights yet.
        """
        weights = self.check_policy()
        if weights.step is not None:
            logging.info(
                "%s: weights of step %d of %d", self._workdir, weights.step, self.config.steps
            )
        if weights.folder is None:
            return self.checkpoint()
        model = dataclasses.replace(
            self.config.model,
            pretrained=str(weights.folder),
            adapter="",
            image_encoder="",
            tokenizer="",
            prediction_type="",
        )
        config = dataclasses.replace(self.config, model=model)
        return models.load_model(config)

    def checkpoint(self):
        """Loads the `Model` of the newest checkpoint: its moving average, if the run keeps one.

        Raises:
          UserError: it cannot be read, or the run trains an encoder and not a generator.
        """
        if not objectives.get(self.config.objective).trains_generator:
            raise UserError(
                f"--workdir={self._workdir}: the run of config.objective = "
                f"{self.config.objective!r} is not finished, and its checkpoints do not contain "
                "a generator. Run the training command again to resume it."
            )
        checkpoints = Checkpoints(self._workdir, read_only=True)
        model = self.base()
        trainable, frozen = split_parameters(model.parameters, self.config.trainable)
        # Restoring places the state as this example, which may differ from the run's placement.
        state, _ = checkpoints.restore(
            create_state(
                jax.device_put(trainable, jax.devices()[0]),
                make_optimizer(self.config),
                self.config.ema_decay,
            )
        )
        checkpoints.close()
        return model.with_parameters(merge_parameters(state.evaluated, frozen))

    def check_policy(self):
        """Finds the weights that `policy` loads, without reading them.

        Returns:
          The `run_folder.Weights`.

        Raises:
          UserError: the run has no weights yet.
        """
        return run_folder.newest_weights(self._workdir)
