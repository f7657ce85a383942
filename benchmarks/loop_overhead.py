"""Overhead of the training loop over its compiled steps: loading, placing, dispatching, logging.

    python benchmarks/loop_overhead.py                 # SDXL's debug sizes
    python benchmarks/loop_overhead.py --profile       # and profile the loop's thread

Runs the training loop, which does not wait for steps, in rounds of three parts:

1. the steps as they are;
2. the same steps on the same batches without the loop ("bare");
3. steps that immediately return the result of an earlier step, so that only the loop remains.

The time of the loop alone is its cost if none of it overlaps with a step. The extra time of a step
is the difference of the first two parts, which is much smaller than the noise of a CPU. Printed are
medians over rounds with 95 % bootstrap intervals. Checkpoints and sample images, which are rare in
a run, are excluded, and so are the first rounds.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from typing import Any, cast

import jax
import numpy as np
from benchmark_cases import changed, load_config

from focusdpo_jax.training import loop
from focusdpo_jax.training.step import Step

WARMUP = 2  # Rounds that are not measured.


class TimedStep:
    """Replacement of `Step.__call__` that times the three parts of each round.

    Attributes:
      seconds: [in the loop, bare, loop alone] per step, one row per round.
    """

    def __init__(self, length: int, profile: Any) -> None:
        self.seconds: list[list[float]] = []
        self._length, self._profile = length, profile
        self._call, self._recorded, self._metrics = Step.__call__, [], {}
        self._count, self._start = 0, 0.0

    def __call__(self, step, structure, state, *arguments):
        """Returns the result of the step, or an earlier one in the part of the loop alone."""
        position, now = self._count % (2 * self._length), time.perf_counter()
        if position == 0:
            if self._count:
                self._profile.disable()
                self.seconds[-1].append((now - self._start) / self._length)
            self._recorded.clear()
            self._start = time.perf_counter()
        elif position == self._length:
            jax.block_until_ready(state)
            end = time.perf_counter()
            for recorded_structure, others in self._recorded:
                state, _ = self._call(step, recorded_structure, state, *others)
            jax.block_until_ready(state)
            bare = time.perf_counter() - end
            self.seconds.append([(end - self._start) / self._length, bare / self._length])
            if len(self.seconds) > WARMUP:
                self._profile.enable()
            self._start = time.perf_counter()
        self._count += 1
        if position >= self._length and structure in self._metrics:
            return state, self._metrics[structure]
        self._recorded.append((structure, arguments))
        state, self._metrics[structure] = self._call(step, structure, state, *arguments)
        return state, self._metrics[structure]


def run(config: Any, length: int, profile: Any) -> np.ndarray:
    """Seconds per step in the loop, of bare steps and of the loop alone, [rounds, 3]."""
    timed_step, step_class = TimedStep(length, profile), cast(Any, Step)
    call = Step.__call__
    step_class.__call__ = lambda *arguments: timed_step(*arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            loop.run(changed(config, data__path=f"{folder}/data"), f"{folder}/run")
    finally:
        step_class.__call__ = call
        profile.disable()
    return np.array(timed_step.seconds)[WARMUP:]


def with_interval(statistic, seconds, resamples=2000) -> str:
    """Formats a statistic of rounds as "value (low to high)" in percent."""
    rows = np.random.default_rng(0).integers(len(seconds), size=(resamples, len(seconds)))
    low, high = np.percentile([statistic(seconds[row]) for row in rows], [2.5, 97.5])
    return f"{statistic(seconds):.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    """Prints the overhead of the loop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=["sdxl_dpo", "debug"],
        help="name in configs/, and its argument",
    )
    parser.add_argument("--rounds", type=int, default=60, help="measured rounds")
    parser.add_argument("--length", type=int, default=20, help="steps per part of a round")
    parser.add_argument("--profile", action="store_true", help="profile the loop's thread")
    arguments = parser.parse_args()
    # Neither checkpoints nor images, since only the loop is measured.
    steps = (arguments.rounds + WARMUP) * 2 * arguments.length + 1
    config = load_config(
        *arguments.config,
        steps=steps,
        log_every=10,
        sample_every=0,
        checkpoint_every=0,
        evaluation__pictures=0,
        evaluation__scenes=0,
    )
    profile: Any = cProfile.Profile()
    if not arguments.profile:
        profile.enable = profile.disable = lambda: None
    seconds = run(config, arguments.length, profile)
    in_loop, bare, loop_alone = 1e3 * np.median(seconds, axis=0)
    print(
        f"{bare:.1f} ms per bare step, {in_loop:.1f} ms in the loop, "
        f"{loop_alone:.2f} ms the loop alone"
    )
    print(
        "the loop alone, as a fraction of a bare step:",
        with_interval(lambda s: np.median(s[:, 2] / s[:, 1]), seconds),
    )
    print(
        "extra time of a step in the loop over a bare step:",
        with_interval(lambda s: np.median(s[:, 0] / s[:, 1]) - 1, seconds),
    )
    if arguments.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
