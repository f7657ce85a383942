"""Console scripts: `focusdpo-train` runs `python -m focusdpo_jax.main`, and so on."""

import runpy


def _run(module):
    # As `python -m`, so that a command and its --help are the same in both ways.
    runpy.run_module(f"focusdpo_jax.{module}", run_name="__main__", alter_sys=True)


def train() -> None:
    """`focusdpo_jax.main`."""
    _run("main")


def sample() -> None:
    """`focusdpo_jax.sample`."""
    _run("sample")


def evaluate() -> None:
    """`focusdpo_jax.evaluate`."""
    _run("evaluate")


def export() -> None:
    """`focusdpo_jax.export`."""
    _run("export")


def prepare() -> None:
    """`focusdpo_jax.prepare`."""
    _run("prepare")


def disrupt() -> None:
    """`focusdpo_jax.disrupt`."""
    _run("disrupt")


def plan() -> None:
    """`focusdpo_jax.plan`."""
    _run("plan")
