"""Multi-process runs: initialisation, shutdown, and communication between the processes."""

import contextlib
import glob
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn, TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils

from focusdpo_jax.errors import UserError

# Seconds without a heartbeat after which a process is considered dead.
HEARTBEAT = 20
# Exit status of a process that ends because another process ended.
LOST = 3

_Value = TypeVar("_Value", bool, int, float)


@contextlib.contextmanager
def distributed(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Iterator[None]:
    """Runs `initialize`, and ends the process at once after an error in the context.

    Normally jax waits at exit for the other processes, which in turn wait for this one. With one
    process exceptions propagate.

    Args:
      coordinator, count, index: see `initialize`.
    """
    initialize(coordinator, count, index)
    try:
        yield
    except (Exception, SystemExit) as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, SystemExit):
            raise  # All processes exit after the same step.
        if isinstance(error, UserError):
            _leave(f"error: {error}", 2)
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = " ".join(str(error).split())
            _leave(
                "error: another process of this run has ended; start all of them again to resume "
                f"from the last checkpoint. ({reason:.300})",
                LOST,
            )
        traceback.print_exc()
        _leave("", 1)


def _leave(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def initialize(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Initialises `jax.distributed` in a multi-process run; call it before any other use of jax.

    Args:
      coordinator: address and port of process 0, "host:1234". None reads the environment (TPU pod
        or GKE, Slurm, Open MPI), which may describe a single process.
      count: number of processes.
      index: index of this process, from 0.

    Raises:
      UserError: only some of the three are given, or the processes cannot connect.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(
            f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or none "
            "of them to read the environment"
        )
    if missing and not _is_one_of_several():
        return
    # Collectives between CPUs, for tests and laptops.
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


def _is_one_of_several() -> bool:
    """Returns whether the environment describes a run of several processes."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, 1)) > 1 for name in tasks):
        return True
    # On a TPU machine `jax.distributed` itself detects whether it is part of a slice.
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = jax.config.jax_platforms or "tpu"  # pyright: ignore[reportAttributeAccessIssue]
    return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Returns whether this is process 0, which writes files, logs and measures for all."""
    return jax.process_index() == 0


def broadcast_from_first(value: _Value) -> _Value:
    """Returns the number or bool of process 0 on every process."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(value))


def barrier(name: str) -> None:
    """Barrier: returns when all processes have called it.

    Args:
      name: identifies the call; the same on every process.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
