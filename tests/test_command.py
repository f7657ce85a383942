import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
from focusdpo_jax import command
command.keep_memory()
np.ones(2**26, np.uint8)
status = open("/proc/self/status").read()
print(int(status.split("VmRSS:")[1].split()[0]) // 2**10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_a_process_that_computes_on_its_cpu_keeps_memory():
    """The process keeps 64 MiB after they are freed, unless the environment forbids it."""

    def resident(**more):
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            check=True,
            env=environment | more,
        )
        return int(done.stdout)

    kept = resident(JAX_PLATFORMS="cpu")
    for reason in (
        {"JAX_PLATFORMS": "cuda"},
        {"JAX_PLATFORMS": "cpu", "MALLOC_TOP_PAD_": "131072"},
    ):
        assert resident(**reason) + 56 < kept
