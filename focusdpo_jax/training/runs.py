"""What a finished or unfinished run has to show: the model it made and the one it started from."""

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
    """The `Model` of a folder with a model.json, or of one that ships with the package.

    Args:
      inpainting: whether its UNet may be one for inpainting, which reads more than latents.
    """
    return models.load_model(_config_of(name), inpainting=inpainting)


def _config_of(name):
    model = config_lib.ModelConfig(pretrained=str(name), remat=False, scan_layers=True)
    return config_lib.RunConfig(dtype="float32", model=model)


def folder_sizes(name, *, inpainting=False):
    """The `GeneratorConfig` of what `load_folder` loads, from its configuration files."""
    return models.generator_config(_config_of(name), inpainting=inpainting)


class Run:
    """A run folder, read and never changed.

    Attributes:
      config: the RunConfig that the run was started with.
    """

    def __init__(self, workdir):
        """Opens the folder.

        Raises:
          UserError: it is not the folder of a run.
        """
        self._workdir = epath.Path(workdir)
        self.config = config_lib.parse_saved(run_folder.read_config(workdir))

    def base(self):
        """The `Model` that the run started from."""
        return models.load_model(self.config)

    def sizes(self):
        """The `GeneratorConfig` of `policy`, from configuration files."""
        folder = self.check_policy().folder
        return models.generator_config(self.config) if folder is None else folder_sizes(folder)

    def policy(self):
        """The `Model` that the run has made so far.

        It is read from where `run_folder.newest_weights` finds it: a finished run has it in a folder
        of its own; of another one the newest checkpoint is taken.

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
        """The `Model` of the newest checkpoint (its moving average, where the run keeps one).

        Raises:
          UserError: it cannot be read, or the run trains an encoder and not a generator.
        """
        if not objectives.get(self.config.objective).trains_generator:
            raise UserError(
                f"--workdir={self._workdir}: the run of config.objective = "
                f"{self.config.objective!r} is not finished, and its checkpoints are no "
                "generators. Run the training's command again, which goes on where it "
                "stopped."
            )
        checkpoints = Checkpoints(self._workdir, read_only=True)
        model = self.base()
        trainable, frozen = split_parameters(model.parameters, self.config.trainable)
        # On a device, so that it is read there, wherever the run had it.
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
        """Raises the UserError of `policy` where there is none, without reading it.

        Returns:
          The `run_folder.Weights` that `policy` reads.
        """
        return run_folder.newest_weights(self._workdir)
