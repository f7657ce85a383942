"""What a finished or unfinished run has to show: the model it made and the one it started from."""

import jax
import ml_collections
from etils import epath

from focusdpo_jax import config as config_rules
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
    return models.load_model(ml_collections.ConfigDict(
        {"seed": 0, "model": {"pretrained": str(name), "lora_rank": 0}}), inpainting=inpainting)


class Run:
    """A run folder, read and never changed.

    Attributes:
      config: the ConfigDict that the run was started with.
    """

    def __init__(self, workdir):
        """Opens the folder.

        Raises:
          UserError: it is not the folder of a run.
        """
        self._workdir = epath.Path(workdir)
        self.config = ml_collections.ConfigDict(run_folder.read_config(workdir))

    def base(self):
        """The `Model` that the run started from."""
        return models.load_model(self.config)

    def policy(self):
        """The `Model` that the run has made so far.

        A finished run has it in a folder of its own; of an unfinished one, the newest checkpoint is
        taken (its moving average, where the run keeps one).

        Raises:
          UserError: the run has no checkpoint yet.
        """
        if self._finished():
            config = config_rules.complete(self.config)
            config.model.update(
                pretrained=str(self._workdir / "model"), adapter="", image_encoder="", tokenizer="",
                prediction_type="")
            return models.load_model(config)
        checkpoints = self._checkpoints()
        model = self.base()
        trainable, frozen = split_parameters(model.parameters, self.config.trainable)
        # On a device, so that it is read there, wherever the run had it.
        state, _ = checkpoints.restore(create_state(
            jax.device_put(trainable, jax.devices()[0]), make_optimizer(self.config),
            self.config.ema_decay))
        checkpoints.close()
        return model.with_parameters(merge_parameters(state.evaluated, frozen))

    def check_policy(self):
        """Raises the UserError of `policy` where there is none, without reading it."""
        if not self._finished():
            self._checkpoints().close()

    def _finished(self):
        return (self._workdir / "model" / "unet.safetensors").exists()

    def _checkpoints(self):
        if (self._workdir / "checkpoints").exists():
            checkpoints = Checkpoints(self._workdir, read_only=True)
            if checkpoints.latest is not None:
                return checkpoints
            checkpoints.close()
        first = min(self.config.checkpoint_every or self.config.steps, self.config.steps)
        raise UserError(f"--workdir={self._workdir}: the run has no checkpoint yet; it writes its "
                        f"first at step {first}.")
