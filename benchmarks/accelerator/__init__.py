"""Measurements on a machine with a GPU: `python -m benchmarks.accelerator`."""

import pathlib
import sys

# Scripts in benchmarks/ import each other as top-level modules, and so does this package.
_SCRIPTS = str(pathlib.Path(__file__).parent.parent)
if _SCRIPTS not in sys.path:
    sys.path.append(_SCRIPTS)
