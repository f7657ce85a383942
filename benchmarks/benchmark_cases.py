"""Configurations for benchmarks: those of `configs/`, as they stand."""

import importlib.util
import pathlib
from typing import Any

from focusdpo_jax import config as config_lib

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def load_config(name: str, *arguments, **changes) -> Any:
    """The RunConfig of configs/<name>.py; `arguments` are what follows the colon.

    `changes` are other values, dots of names as double underscores; they are not checked.
    """
    config = config_lib.parse(load_file(CONFIGS / f"{name}.py", *arguments))
    return changed(config, **changes)


def changed(config: Any, **changes):
    """A RunConfig with other values, dots of names as double underscores."""
    return config_lib.replace(
        config, {name.replace("__", "."): value for name, value in changes.items()}
    )


def load_file(path: pathlib.Path, *arguments) -> Any:
    """The ConfigDict of a file."""
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
