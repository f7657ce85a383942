"""Cost of a run over many pairs: arithmetic on a plan, with every assumption in one place."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Quantities that a plan does not determine.

    Attributes:
      pairs: that are trained on.
      read_bandwidth: bytes a second that one machine reads from where the data lie.
      write_bandwidth: bytes a second that one machine writes to where checkpoints lie.
      host_copy: bytes a second from the memory of one chip to its machine, which training waits for.
      records_per_file: of a data set's files ("shards").
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
      made: result of `planner.plan`: "chips", "batch_size", "accumulate", "checkpoint_every",
        "pairs_per_second", "record_bytes", "checkpoint_bytes" and "checkpoint_bytes_per_chip" are used.
      chips_per_host: chips of one machine.
      assumptions: number of pairs, bandwidths and file sizes.

    Returns:
      A dict: "hosts", "chip_hours", "hours", their parts in seconds ("training", "waiting_for_data",
      "checkpoints", of which there are "checkpoint_count"), "reads_per_second" and "bytes_per_second" of
      a host, and "files".

    Raises:
      ValueError: the plan has no estimate of the speed.
    """
    if not made["pairs_per_second"]:
        raise ValueError("a plan without pairs_per_second")
    hosts = math.ceil(made["chips"] / chips_per_host)
    training = assumptions.pairs / made["pairs_per_second"]
    reads = made["pairs_per_second"] / hosts
    # Reading goes on beside training; what it takes longer is waited for.
    reading = assumptions.pairs * made["record_bytes"] / (hosts * assumptions.read_bandwidth)
    waiting = max(reading - training, 0)
    updates = assumptions.pairs / (made["batch_size"] * made["accumulate"])
    count = math.ceil(updates / made["checkpoint_every"])
    # A checkpoint is copied while training waits, and written beside it; the next one waits for that.
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
