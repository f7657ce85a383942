"""Configurations for benchmarks: those of `configs/`, as they stand."""

import importlib.util
import pathlib

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def load_config(name, *arguments):
    """The configuration of configs/<name>.py; `arguments` are what follows the colon."""
    return load_file(CONFIGS / f"{name}.py", *arguments)


def load_file(path, *arguments):
    """The configuration of a file."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
