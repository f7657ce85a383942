"""Configurations for benchmarks: those of `configs/`, as they stand."""

from focusdpo_jax import config as config_lib
from focusdpo_jax import config_files


def load_config(name: str, *arguments, **changes) -> config_lib.RunConfig:
    """The RunConfig of configs/<name>.py; `arguments` are what follows the colon.

    `changes` are other values, dots of names as double underscores; they are not checked.
    """
    config = config_lib.parse(config_files.load(name, *arguments))
    return changed(config, **changes)


def changed(config: config_lib.RunConfig, **changes) -> config_lib.RunConfig:
    """A RunConfig with other values, dots of names as double underscores."""
    return config_lib.replace(
        config, {name.replace("__", "."): value for name, value in changes.items()}
    )
