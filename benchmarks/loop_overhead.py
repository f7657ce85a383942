"""How much of a run's time is not its compiled step: loading, placing, dispatching, logging.

    python benchmarks/loop_overhead.py                 # SDXL's debug sizes
    python benchmarks/loop_overhead.py --profile       # and what the loop's thread does

Runs the real loop, which waits for nothing, in rounds of three stretches:

1. of steps as they are;
2. of the same steps on the same batches once more, with nothing else ("bare");
3. of steps that return at once what such a step gave before: all that remains is the loop's own time.

The loop's own time is what it would add if nothing of it fell under a step. What it does add is the
difference of the first two, in which a CPU's noise is many times larger. Printed are medians over rounds
with 95 % intervals (bootstrap). Saving and drawing, which a run does seldom, are left out, and so are the
first rounds.
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

WARMUP = 2


class Stretches:
    """In the place of `Step.__call__`: times the three stretches of each round.

    Attributes:
      seconds: [[of the loop, of bare steps, of the loop alone]] a step, a row for each round.
    """

    def __init__(self, length: int, profile: Any) -> None:
        self.seconds: list[list[float]] = []
        self._length, self._profile = length, profile
        self._call, self._seen, self._metrics = Step.__call__, [], {}
        self._count, self._start = 0, 0.0

    def __call__(self, step, structure, state, *arguments):
        """The step's result, or what it looks like; where a stretch ends, its time is taken."""
        place, now = self._count % (2 * self._length), time.perf_counter()
        if place == 0:
            if self._count:
                self._profile.disable()
                self.seconds[-1].append((now - self._start) / self._length)
            self._seen.clear()
            self._start = time.perf_counter()
        elif place == self._length:
            jax.block_until_ready(state)
            end = time.perf_counter()
            for before, others in self._seen:
                state, _ = self._call(step, before, state, *others)
            jax.block_until_ready(state)
            bare = time.perf_counter() - end
            self.seconds.append([(end - self._start) / self._length, bare / self._length])
            if len(self.seconds) > WARMUP:
                self._profile.enable()
            self._start = time.perf_counter()
        self._count += 1
        if place >= self._length and structure in self._metrics:
            return state, self._metrics[structure]
        self._seen.append((structure, arguments))
        state, self._metrics[structure] = self._call(step, structure, state, *arguments)
        return state, self._metrics[structure]


def run(config: Any, length: int, profile: Any) -> np.ndarray:
    """Seconds [rounds, 3] a step of the loop, of bare steps and of the loop alone."""
    stretches, of_class = Stretches(length, profile), cast(Any, Step)
    call = Step.__call__
    of_class.__call__ = lambda *arguments: stretches(*arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            loop.run(changed(config, data__path=f"{folder}/data"), f"{folder}/run")
    finally:
        of_class.__call__ = call
        profile.disable()
    return np.array(stretches.seconds)[WARMUP:]


def with_interval(statistic, seconds, draws=2000) -> str:
    """A statistic of rounds, as "median (low to high)" in percent."""
    rows = np.random.default_rng(0).integers(len(seconds), size=(draws, len(seconds)))
    low, high = np.percentile([statistic(seconds[drawn]) for drawn in rows], [2.5, 97.5])
    return f"{statistic(seconds):.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    """Prints what the loop adds to its steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        nargs="+",
        default=["sdxl_dpo", "debug"],
        help="name in configs/, and its argument",
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--length", type=int, default=20, help="steps of a stretch")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    # Of the last step's end only the loop is wanted, neither checkpoint nor picture.
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
    in_loop, bare, alone = 1e3 * np.median(seconds, axis=0)
    print(f"{bare:.1f} ms a bare step, {in_loop:.1f} ms in the loop, {alone:.2f} ms the loop alone")
    print(
        "the loop alone, of a bare step:",
        with_interval(lambda s: np.median(s[:, 2] / s[:, 1]), seconds),
    )
    print(
        "the loop with its steps, more than bare ones:",
        with_interval(lambda s: np.median(s[:, 0] / s[:, 1]) - 1, seconds),
    )
    if arguments.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
