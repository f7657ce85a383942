"""The measurements in order of priority, with time limits.

A job is measured in one process. The order matters if the machine is available for ten minutes
only: first accuracy and speed of attention, then the adapter's step at both resolutions compared
with diffusers, then an image, then variants of the step.
"""

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

PARTS = ("attention", "step", "sampling", "variants")
SIZES = ("full", "debug")


@dataclasses.dataclass(frozen=True)
class Job:
    """Measurements of one process.

    Attributes:
      name: unique name.
      part: one of PARTS, or "device" for the first job.
      seconds: time limit.
      module: module of this package whose `measure(settings, context)` yields rows.
      settings: JSON values.
    """

    name: str
    part: str
    seconds: float
    module: str
    settings: dict[str, Any]

    def measure(self, context: Any):
        """Yields rows, which are dicts of JSON values; `context` is a Context."""
        module = importlib.import_module(f".{self.module}", __package__)
        yield from module.measure(self.settings, context)


@dataclasses.dataclass(frozen=True)
class Context:
    """Arguments of a job besides its settings.

    Attributes:
      seconds: time limit of the job.
      scratch: folder for weights that both sides of a step read; removed after the last job.
    """

    seconds: float
    scratch: str


DEVICE = Job("device", "device", 90, "device", {})


def all_jobs(size: str, peers: Any) -> list[Job]:
    """Returns all jobs in order of priority.

    Args:
      size: "full" for SDXL, or "debug" for its architecture at small sizes, for a test on a CPU.
      peers: names in `step.PEERS` to compare some steps with, if diffusers is installed.
    """
    return _full(list(peers)) if size == "full" else _debug(list(peers))


def select(jobs: list[Job], names: Iterable[str]) -> list[Job]:
    """Selects the jobs whose part or name is in `names`, in order of priority.

    Raises:
      ValueError: a name is neither a part nor a job.
    """
    known = {job.part for job in jobs} | {job.name for job in jobs}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: neither a part nor a job; choose among "
            f"{', '.join(PARTS)} and {', '.join(job.name for job in jobs)}"
        )
    return [job for job in jobs if job.part in names or job.name in names]


def _step(name, seconds, part="step", peers=(), rounds=10, **changes):
    settings = {
        "size": "full",
        "resolution": 1024,
        "batch": 1,
        "trainable": "adapter",
        "objective": "dpo",
        "dtype": "bfloat16",
        "remat": True,
        "scan_layers": True,
        "peers": list(peers),
        "warmup": 2,
        "rounds": rounds,
    }
    return Job(name, part, seconds, "train_step", settings | changes)


def _full(peers):
    attention = {
        "size": "full",
        "resolutions": [1024, 512, 768],
        "references": [1, 3, 2],
        "every": 1,
        "batch": 2,
        "iterations": 20,
        "repeats": 5,
    }
    sampling = {"size": "full", "resolution": 1024, "steps": 30, "guidance": 5.0, "repeats": 3}
    return [
        Job("attention", "attention", 120, "attention", attention),
        _step("step-1024", 330, peers=peers),
        _step("step-512", 270, peers=peers, resolution=512),
        Job("sampling-1024", "sampling", 150, "sampling", sampling),
        _step("step-1024-batch-4", 240, batch=4),
        _step("remat-off-1024", 300, "variants", peers=peers, remat=False),
        _step("lora-1024", 210, "variants", trainable="lora"),
        _step("full-1024", 270, "variants", trainable="full"),
        _step("focus-dpo-1024", 240, "variants", objective="focus_dpo"),
        _step("unrolled-1024", 400, "variants", scan_layers=False),
        _step("step-512-batch-8", 210, resolution=512, batch=8),
        _step("step-1024-batch-8", 240, batch=8),
        _step("step-512-batch-32", 240, resolution=512, batch=32, rounds=5),
        _step("step-1024-batch-16", 270, batch=16, rounds=5),
        _step("remat-off-512", 210, "variants", resolution=512, remat=False),
        _step("lora-512", 210, "variants", resolution=512, trainable="lora"),
        _step("full-512", 240, "variants", resolution=512, trainable="full"),
        Job("sampling-512", "sampling", 150, "sampling", sampling | {"resolution": 512}),
    ]


def _debug(peers):
    small = {"size": "debug", "resolution": 64, "rounds": 3}
    return [
        Job(
            "attention",
            "attention",
            120,
            "attention",
            {
                "size": "debug",
                "resolutions": [64],
                "references": [1],
                "every": 4,
                "batch": 2,
                "iterations": 2,
                "repeats": 2,
            },
        ),
        # Not bfloat16, in which PyTorch is slow on a CPU and losses differ by rounding.
        _step("step-64", 240, peers=peers, dtype="float32", **small),
        Job(
            "sampling-64",
            "sampling",
            120,
            "sampling",
            {"size": "debug", "resolution": 64, "steps": 2, "guidance": 5.0, "repeats": 2},
        ),
        _step("step-64-batch-2", 180, batch=2, **small),
        _step("remat-off-64", 180, "variants", remat=False, **small),
        _step("lora-64", 180, "variants", trainable="lora", **small),
        _step("full-64", 180, "variants", trainable="full", **small),
        _step("focus-dpo-64", 180, "variants", objective="focus_dpo", **small),
    ]
