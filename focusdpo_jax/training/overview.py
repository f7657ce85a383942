"""Writes `parameters.txt`: a table of a run's arrays with shape, type, size and sharding."""

import jax
from absl import logging
from clu import parameter_overview
from etils import epath

from focusdpo_jax.files import replace_file


def write(workdir, trainable, frozen):
    """Writes the table to the run folder, and the totals to the log; reads no array.

    The table has a row for each array, of which there may be thousands, too many for the log.

    Args:
      workdir: folder of the run.
      trainable, frozen: pytrees of arrays or of `jax.ShapeDtypeStruct`s with shardings.
    """
    path = epath.Path(workdir) / "parameters.txt"
    rows = _rows({"trainable": trainable, "frozen": frozen})
    # Statistics, which are the default, would fetch every array.
    table = parameter_overview.get_parameter_overview(rows, include_stats="sharding")
    replace_file(path, table + "\n")
    logging.info(
        "trainable: %s; frozen: %s; each array is listed in %s",
        _totals(trainable),
        _totals(frozen),
        path,
    )


def _rows(tree):
    """Returns {path: array} of any pytree, since `parameter_overview` only supports dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _totals(tree):
    leaves = jax.tree.leaves(tree)
    size = sum(leaf.size for leaf in leaves)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return f"{size / 1e6:.2f} M parameters in {len(leaves)} arrays, {held / 1e9:.3g} GB"
