"""The measurements in order of value, and how long each may take.

A job is what one process measures. The first ones answer what people ask first, should the machine be
gone after ten minutes: whether attention is right and fast, then the step of the adapter at both
resolutions beside diffusers', then an image, then what changes the step's cost.
"""

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

PARTS = ("attention", "step", "sampling", "variants")
SIZES = ("full", "debug")


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's measurements.

    Attributes:
      name: unique.
      part: one of PARTS, or "device" for what precedes them all.
      seconds: after which it is stopped.
      module: of this package, whose `measure(settings, context)` yields rows.
      settings: JSON values.
    """

    name: str
    part: str
    seconds: float
    module: str
    settings: dict[str, Any]

    def measure(self, context: Any):
        """Yields rows, dicts of JSON values; see `Context`."""
        module = importlib.import_module(f".{self.module}", __package__)
        yield from module.measure(self.settings, context)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a job is given besides its settings.

    Attributes:
      seconds: that it has.
      scratch: a folder for weights that two sides read; it is removed after the last job.
    """

    seconds: float
    scratch: str


DEVICE = Job("device", "device", 90, "device", {})


def all_jobs(size: str, peers: Any) -> list[Job]:
    """Every Job of "full", which is SDXL, or "debug", its anatomy for a rehearsal on a CPU.

    Args:
      peers: names of `step.PEERS` to step beside the first steps, where diffusers is installed.
    """
    return _full(list(peers)) if size == "full" else _debug(list(peers))


def chosen(jobs: list[Job], names: Iterable[str]) -> list[Job]:
    """Those of `jobs` whose part or name is in `names`, in order of value.

    Raises:
      ValueError: a name is neither.
    """
    known = {job.part for job in jobs} | {job.name for job in jobs}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: neither a part nor a job; there are "
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
        # In bfloat16 PyTorch takes seconds for it on a CPU, and losses differ by rounding.
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
