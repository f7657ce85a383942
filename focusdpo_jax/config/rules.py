"""Rules about several fields of a configuration."""

from focusdpo_jax import objectives
from focusdpo_jax.errors import UserError


def check_together(config):
    """Checks fields that depend on each other.

    Raises:
      UserError: the message names the field, its value and valid values.
    """
    objective = objectives.get(config.objective)
    if config.dtype != "float32" and not objective.trains_generator:
        raise UserError(
            f"config.dtype = {config.dtype!r}: config.objective = "
            f"{config.objective!r} trains an encoder; give 'float32'"
        )
    filled = [axis for axis, size in config.mesh.sizes.items() if size == -1]
    if len(filled) > 1:
        raise UserError(
            f"config.mesh.{filled[1]} = -1: config.mesh.{filled[0]} = -1 takes the "
            "devices that are left already; give a number to one of them"
        )
    if (
        config.focus.features == "unet"
        and objective.uses_focus
        and config.focus.spaf
        and not config.data.cache
    ):
        raise UserError(
            "config.data.cache = False: config.focus.features = 'unet' denoises every "
            "reference once in each bucket, which no step can afford; give True"
        )
    if objective.reads_rejected:
        if config.rejected_share:
            raise UserError(
                f"config.rejected_share = {config.rejected_share}: "
                f"{config.objective} learns from both images of a pair; give 0"
            )
        if config.timestep_logits:
            raise UserError(
                f"config.timestep_logits = {config.timestep_logits}: "
                f"{config.objective} samples uniformly within its buckets; give ()"
            )
        if config.trainable == "generator":
            raise UserError(
                "config.trainable = 'generator': text encoders are trained with "
                "config.objective = 'sft' or 'subject_sft'; choose adapter, lora or "
                "full"
            )
    if config.anchor_fades and not config.anchor:
        raise UserError("config.anchor_fades = True: config.anchor = 0 is none; give 1.0, or False")
    if objective.uses_focus:
        _check_focus(config.focus)
    if config.trainable == "lora" and not config.model.lora_rank:
        raise UserError(
            "config.model.lora_rank = 0: config.trainable = 'lora' needs a rank, for example 8"
        )
    if not config.model.pretrained and config.model.sizes is None:
        raise UserError(
            "config.model.pretrained = '': give a folder to start from, or a new model's "
            "config.model.sizes, as configs/toybox_base.py does"
        )
    if config.data.source == "toybox":
        _check_toybox(config)
    elif not objective.trains_generator:
        raise UserError(
            f"config.data.source = {config.data.source!r}: {config.objective} learns "
            "from Toybox's ground truth; give 'toybox'"
        )


def _check_focus(focus):
    """Refuses fields without effect."""
    for name, needed in (
        ("own_subject", "spaf"),
        ("coverage", "spaf"),
        ("detail_colour", "dpce"),
        ("reference_detail", "dpce"),
    ):
        if getattr(focus, name) and not getattr(focus, needed):
            raise UserError(
                f"config.focus.{name} = True: it has no effect with config.focus.{needed} = False; "
                "give False"
            )
    if focus.observed == "policy" and not (
        focus.lambda_c or (focus.spaf and focus.features != "vit")
    ):
        raise UserError(
            "config.focus.observed = 'policy': the maps read nothing of a model; give "
            "config.focus.features = 'attention' or 'unet', or config.focus.lambda_c > 0, or "
            "'reference'"
        )


def _check_toybox(config):
    """Checks the sizes of a Toybox data set that is built later."""
    if config.evaluation.scenes > config.data.test_size:
        raise UserError(
            f"config.evaluation.scenes = {config.evaluation.scenes}: there are only "
            f"config.data.test_size = {config.data.test_size} of them"
        )
    for field in ("pictures", "validation_scenes"):
        count = getattr(config.evaluation, field)
        if count > config.data.validation_size:
            raise UserError(
                f"config.evaluation.{field} = {count}: there are "
                f"only config.data.validation_size = {config.data.validation_size}"
            )
    pairs, count = config.batch_size * config.accumulate, config.data.train_size
    if pairs > count:
        raise UserError(
            f"config.data.train_size = {count}: a step takes {_step_pairs(config)}; "
            f"give at least {pairs}, or {smaller_step(config, count)}"
        )


def _step_pairs(config):
    product = f"config.batch_size = {config.batch_size}"
    if config.accumulate > 1:
        product += f" times config.accumulate = {config.accumulate}"
    return product + " pairs"


def smaller_step(config, count, shares=None):
    """Returns a proposal, in words, for a step of at most `count` pairs.

    Args:
      config: the `RunConfig`.
      count: available pairs.
      shares: number of devices that share a batch; None for the sizes in `config.mesh`, where -1
        counts as 1.
    """
    shares = shares or max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)
    largest = count // config.accumulate // shares * shares
    if largest:
        return f"config.batch_size = {largest} at most"
    most = count // shares
    if most:
        return f"config.batch_size = {shares} and config.accumulate = {most} at most"
    return f"fewer devices than {shares} in config.mesh.data and config.mesh.fsdp"


def require_pairs(config, path, count, shares):
    """Checks that a prepared data set has enough pairs for a step.

    Args:
      config: the `RunConfig`.
      path: path of the data set.
      count: number of its training pairs.
      shares: number of devices that share a batch.

    Raises:
      UserError: a step needs more pairs.
    """
    if config.batch_size * config.accumulate > count:
        raise UserError(
            f"config.batch_size = {config.batch_size}: {path} has {count} pairs to train on, "
            f"and a step takes {_step_pairs(config)}; give "
            f"{smaller_step(config, count, shares)}, or prepare more pairs"
        )
