"""`clu.metric_writers` and `clu.periodic_actions`, imported without TensorFlow.

Importing either of them imports TensorFlow for `metric_writers.SummaryWriter`, which takes seconds
and fails if TensorFlow is not installed. This module delays that import until a `SummaryWriter` is
created.
"""

import sys
import types
from typing import Any

_SUMMARY_WRITER = "clu.metric_writers.summary_writer"


def _summary_writer(*arguments, **fields):
    """Creates a `clu.metric_writers.SummaryWriter`; imports TensorFlow."""
    from clu.metric_writers.tf import summary_writer

    return summary_writer.SummaryWriter(*arguments, **fields)


if "clu.metric_writers" not in sys.modules:
    stub = types.ModuleType(_SUMMARY_WRITER, "Stands in for a module that imports TensorFlow.")
    vars(stub)["SummaryWriter"] = _summary_writer
    sys.modules.setdefault(_SUMMARY_WRITER, stub)

import clu.metric_writers  # noqa: E402
import clu.periodic_actions  # noqa: E402

metric_writers: Any = clu.metric_writers
periodic_actions: Any = clu.periodic_actions

__all__ = ["metric_writers", "periodic_actions"]
