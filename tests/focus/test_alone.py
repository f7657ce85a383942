"""focus/ and diffusion/ import jax, numpy and jaxtyping alone; the package imports nothing by itself."""

import subprocess
import sys

# Refuses what an environment of jax, numpy and jaxtyping does not have.
BLOCKED = """
import importlib.metadata, importlib.util, re, sys

def needed(name, found):
    name = re.sub("[-_.]+", "-", name).lower()
    if name not in found:
        found.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            if "extra ==" not in requirement:
                needed(re.match("[A-Za-z0-9._-]+", requirement)[0], found)
    return found

allowed = set()
for name in ("jax", "numpy", "jaxtyping"):
    needed(name, allowed)
packages = importlib.metadata.packages_distributions()
heavy = ("flax", "optax", "orbax", "ml_collections", "etils", "absl", "tensorflow", "grain", "transformers")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        owners = {re.sub("[-_.]+", "-", owner).lower() for owner in packages.get(root, ())}
        if owners and not owners & allowed and root != "focusdpo_jax":
            # As if it were not installed; jax and numpy try some that they can do without.
            raise ModuleNotFoundError(f"No module named {name!r}: it is neither jax, numpy nor jaxtyping")

sys.meta_path.insert(0, Refuse())
for name in heavy:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was not refused")
"""

SCRIPT = """
import focusdpo_jax as fd
assert "jax" not in sys.modules and fd.__version__
assert {"focus", "diffusion"} <= set(dir(fd))
import focusdpo_jax.focus, focusdpo_jax.diffusion
import jax.numpy as jnp
maps = jnp.ones((2, 4, 4))
loss, _ = fd.focus.diffusion_dpo(maps, maps, maps, maps, maps, maps, 5000.0)
print(loss.round(4), fd.diffusion.scaled_linear_schedule().timesteps)
try:
    fd.nothing
except AttributeError as error:
    print(error)
"""


def test_it_works_with_only_jax_numpy_and_jaxtyping_installed():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "[0.6931 0.6931] 1000",
        "module 'focusdpo_jax' has no attribute 'nothing'",
    ], done.stderr
