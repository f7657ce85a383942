"""Several processes that train one model, and what they have to agree on."""

import contextlib
import glob
import importlib.util
import os
import sys
import traceback

import jax
from absl import logging
from jax.experimental import multihost_utils

from focusdpo_jax.errors import UserError

# A process that has not been heard of for so long (seconds) is taken for dead.
HEARTBEAT = 20
# Exit status of a process that has lost another one.
LOST = 3


@contextlib.contextmanager
def distributed(coordinator=None, count=None, index=None):
    """`initialize`, and an end that holds nobody up.

    Whoever leaves by an error, or because another process has gone, leaves at once: jax would wait
    for the others first, who wait for this one.
    """
    initialize(coordinator, count, index)
    try:
        yield
    except (Exception, SystemExit) as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, SystemExit):
            raise  # All of them, after the same step.
        if isinstance(error, UserError):
            _leave(f"error: {error}", 2)
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = " ".join(str(error).split())
            _leave(
                "error: another process of this run has gone; start all of them again to go on "
                f"from the last checkpoint. ({reason:.300})",
                LOST,
            )
        traceback.print_exc()
        _leave("", 1)


def _leave(message, status):
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def initialize(coordinator=None, count=None, index=None):
    """Joins the other processes of a run, where there are any; before any other use of jax.

    Args:
      coordinator: address and port of process 0, "host:1234"; None takes them from the
        environment (TPU pod or GKE, Slurm, Open MPI) and stays alone where that knows no others.
      count, index: number of processes, and this one's, from 0 on.

    Raises:
      UserError: of the three some are given and others not, or the others do not answer.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(
            f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or none "
            "of them to read the environment"
        )
    if missing and not _has_others():
        return
    # Processes on CPUs, for tests and for a laptop.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "the processes of this run cannot find each other: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if not is_first():
        logging.set_verbosity(logging.WARNING)


def _has_others():
    """Whether the environment says that this is one process of several."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, 1)) > 1 for name in tasks):
        return True
    # A TPU machine knows by itself whether it is one of a slice.
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = jax.config.jax_platforms or "tpu"
    return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def is_first():
    """Whether this process writes, shows and measures for all."""
    return jax.process_index() == 0


def from_first(value):
    """The number or truth value that process 0 has, on all of them."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(value))


def wait(name):
    """Goes on when all processes have come here; `name` tells places apart."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
