"""The step's programs, compiled beside other work."""

import threading
import types

import jax
import pytest

from focusdpo_jax.sharding import mesh as meshes
from focusdpo_jax.training import step


def test_an_error_beside_the_compilation_does_not_wait_for_it(monkeypatch):
    finish, finished = threading.Event(), threading.Event()

    def compile_slowly(*_):
        finish.wait(60)
        finished.set()

    monkeypatch.setattr(step, "_compile", compile_slowly)
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, 1, jax.devices()[:1])
    with pytest.raises(OSError, match="no data"):
        with step.compile_beside(types.SimpleNamespace(mesh=mesh), None, (), (), seed=0):
            raise OSError("no data")
    assert not finished.is_set()
    finish.set()
    assert finished.wait(60)
