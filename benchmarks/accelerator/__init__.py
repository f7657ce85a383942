"""What a machine with a GPU is asked to measure, by one command: `python -m benchmarks.accelerator`."""

import pathlib
import sys

# The scripts beside this package import each other by their bare names, and it imports them so.
_SCRIPTS = str(pathlib.Path(__file__).parent.parent)
if _SCRIPTS not in sys.path:
    sys.path.append(_SCRIPTS)
