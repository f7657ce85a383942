"""Shared by all tests: where compiled programs are kept, and a tiny model and data set."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

# The runs of this session, in this process and in others, share their compiled programs.
_CACHE = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"focusdpo_jax-tests-{os.getpid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Also the hundreds of tiny ones that every process would compile again, in 36 ms each and not 12.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far longer than they compute. Without LLVM's expensive passes, XLA's fusion emitters and several
# LLVM modules for each program, the tiny run's step compiles in 13 s of CPU time instead of 34. XLA ends the process
# if it does not know an option; later versions have no fusion emitters to switch off.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
_FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# Tracing creates millions of objects, few of them garbage. With Python's default thresholds, the collections
# take a twelfth of the CPU time of a test that trains.
gc.set_threshold(100_000, 50, 100)

# Checks the signatures of these packages and modules on every call, or trace: a wrong shape fails there. In a
# conftest and not as an option, since the workers of pytest-xdist do not read `addopts`. Without beartype
# tests/focus/test_signatures.py and a test in tests/models/test_generator.py fail.
if importlib.util.find_spec("beartype"):
    import jaxtyping

    jaxtyping.install_import_hook(
        ["focusdpo_jax.focus", "focusdpo_jax.diffusion", "focusdpo_jax.models.generator"],
        # An int is a float, as type checkers have it.
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )


def pytest_sessionfinish():
    """Removes the compiled programs, once the last worker has done its tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    import shutil

    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with `data`, a small data set, and `model`, a small random generator."""
    import jax
    import numpy as np
    import tiny

    from focusdpo_jax.training import models, run_data

    folder = tmp_path_factory.mktemp("tiny")
    config = tiny.tiny_config(folder, model__pretrained="")
    run_data.open_data(config)
    model = models.load_model(config)
    # A fresh generator has layers of zeros, through which no gradient reaches what lies before.
    draw = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda x: np.asarray(x) + draw.normal(0, 0.05, x.shape).astype(np.float32), model.parameters
    )
    models.save_model(folder / "model", model, parameters)
    return folder


@pytest.fixture
def tiny_config(tiny_folder):
    """tiny_config(**overrides): a configuration of the tiny run, `a__b=1` for config.a.b."""
    import tiny

    def make(**overrides):
        return tiny.tiny_config(tiny_folder, **overrides)

    return make


@pytest.fixture
def cudnn_to_trace(monkeypatch):
    """JAX takes cuDNN for installed, whose version it reads while attention is traced."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
