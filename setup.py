"""Packages; all else is in setup.cfg.

`configs/` stays at the top of the repository, and is `focusdpo_jax/configs/` of the installed package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["focusdpo_jax", "focusdpo_jax.*"]), "focusdpo_jax.configs"],
    package_dir={"focusdpo_jax.configs": "configs"},
)
