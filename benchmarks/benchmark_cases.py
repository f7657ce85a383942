"""Loads the configurations in `configs/` for benchmarks."""

from focusdpo_jax import config as config_lib
from focusdpo_jax import config_files


def load_config(name: str, *arguments, **changes) -> config_lib.RunConfig:
    """Loads configs/<name>.py as a RunConfig.

    Args:
      name: of the file, without its ending.
      arguments: text after the colon in --config.
      changes: fields to replace, with `__` for each dot in a name. Their values are not checked.
    """
    config = config_lib.parse(config_files.load(name, *arguments))
    return changed(config, **changes)


def changed(config: config_lib.RunConfig, **changes) -> config_lib.RunConfig:
    """Replaces fields of a RunConfig, with `__` for each dot in a name."""
    return config_lib.replace(
        config, {name.replace("__", "."): value for name, value in changes.items()}
    )
