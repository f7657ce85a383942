"""Computes the cost of a run over many pairs from a plan and explicit assumptions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Quantities that a plan does not determine.

    Attributes:
      pairs: number of training pairs.
      read_bandwidth: bytes per second that one machine reads from the storage of the data.
      write_bandwidth: bytes per second that one machine writes to the storage of checkpoints.
      host_copy: bytes per second from the memory of one chip to its machine; training waits for it.
      records_per_file: records per file ("shard") of the data set.
    """

    pairs: float = 1e6
    read_bandwidth: float = 1e9
    write_bandwidth: float = 0.5e9
    host_copy: float = 10e9
    records_per_file: int = 1000


def cost(
    made: Mapping[str, Any], chips_per_host: int, assumptions: Assumptions = Assumptions()
) -> dict[str, Any]:
    """Returns the chip-hours of a run over `assumptions.pairs`, each seen once.

    Args:
      made: result of `planner.plan`, of which "chips", "batch_size", "accumulate",
        "checkpoint_every", "pairs_per_second", "record_bytes", "checkpoint_bytes" and
        "checkpoint_bytes_per_chip" are read.
      chips_per_host: number of chips of one machine.
      assumptions: number of pairs, bandwidths and file sizes.

    Returns:
      A dict: "hosts", "hours", "chip_hours", the parts of the time in seconds ("training",
      "waiting_for_data", "checkpoints"), "checkpoint_count", "reads_per_second" and
      "bytes_per_second" of one host, and "files".

    Raises:
      ValueError: the plan has no estimate of the speed.
    """
    if not made["pairs_per_second"]:
        raise ValueError("a plan without pairs_per_second")
    hosts = math.ceil(made["chips"] / chips_per_host)
    training = assumptions.pairs / made["pairs_per_second"]
    reads = made["pairs_per_second"] / hosts
    # Data is read during training; training waits only for the excess.
    reading = assumptions.pairs * made["record_bytes"] / (hosts * assumptions.read_bandwidth)
    waiting = max(reading - training, 0)
    updates = assumptions.pairs / (made["batch_size"] * made["accumulate"])
    count = math.ceil(updates / made["checkpoint_every"])
    # Training waits while a checkpoint is copied to the host. It is written during training, and
    # the next checkpoint waits until it is written.
    interval = (training + waiting) / count
    writing = made["checkpoint_bytes"] / (hosts * assumptions.write_bandwidth)
    checkpoints = count * (
        made["checkpoint_bytes_per_chip"] / assumptions.host_copy + max(writing - interval, 0)
    )
    seconds = training + waiting + checkpoints
    return {
        "hosts": hosts,
        "hours": seconds / 3600,
        "chip_hours": made["chips"] * seconds / 3600,
        "training": training,
        "waiting_for_data": waiting,
        "checkpoints": checkpoints,
        "checkpoint_count": count,
        "reads_per_second": reads,
        "bytes_per_second": reads * made["record_bytes"],
        "files": math.ceil(assumptions.pairs / assumptions.records_per_file),
    }
