"""How much of a run's time is not its compiled step: loading, placing, dispatching, logging.

    python benchmarks/loop_overhead.py                 # SDXL's debug sizes
    python benchmarks/loop_overhead.py --profile       # and what the loop's thread does

Runs the real loop, which waits for nothing. After every stretch of it the same steps are run once more,
on the same batches and with nothing else. Printed is by how much a stretch of the
loop takes longer, the median over stretches and its quartiles. Saving and drawing, which a run does
seldom, are left out, and so are the first stretches.
"""

import argparse
import cProfile
import pstats
import tempfile
import time

import jax
import numpy as np
from benchmark_cases import load_config

from focusdpo_jax.training import loop
from focusdpo_jax.training.step import Step

WARMUP = 2


class Stretches:
    """In the place of `Step.__call__`: times stretches of the loop and of bare steps in turn.

    Attributes:
      seconds: [[of the loop, of bare steps]] a step, a pair for each stretch.
    """

    def __init__(self, length, profile):
        self.seconds, self._length, self._profile = [], length, profile
        self._call, self._seen, self._start = Step.__call__, [], None

    def __call__(self, step, structure, state, *arguments):
        """The step's result; where a stretch ends, after its steps have been run again."""
        if len(self._seen) == self._length:
            jax.block_until_ready(state)
            end = time.perf_counter()
            self._profile.disable()
            for before, others in self._seen:
                state, _ = self._call(step, before, state, *others)
            jax.block_until_ready(state)
            bare = time.perf_counter() - end
            self.seconds.append([(end - self._start) / self._length, bare / self._length])
            self._seen.clear()
        if not self._seen:
            self._start = time.perf_counter()
            if len(self.seconds) >= WARMUP:
                self._profile.enable()
        self._seen.append((structure, arguments))
        return self._call(step, structure, state, *arguments)


def run(config, length, profile):
    """Seconds [stretches, 2] a step of the loop and of bare steps."""
    stretches = Stretches(length, profile)
    call = Step.__call__
    Step.__call__ = lambda *arguments: stretches(*arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.data.path = f"{folder}/data"
            loop.run(config, f"{folder}/run")
    finally:
        Step.__call__ = call
        profile.disable()
    return np.array(stretches.seconds)[WARMUP:]


def main():
    """Prints what the loop adds to its steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["sdxl_dpo", "debug"],
                        help="name in configs/, and its argument")
    parser.add_argument("--stretches", type=int, default=24)
    parser.add_argument("--length", type=int, default=20, help="steps of a stretch")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    config = load_config(*arguments.config)
    # Of the last step's end only the loop is wanted, neither checkpoint nor picture.
    steps = (arguments.stretches + WARMUP) * arguments.length + 1
    config.update({"steps": steps, "log_every": 10, "sample_every": 10**6,
                   "checkpoint_every": 10**6})
    config.evaluation.update({"pictures": 0, "scenes": 0})
    profile = cProfile.Profile()
    if not arguments.profile:
        profile.enable = profile.disable = lambda: None
    in_loop, bare = run(config, arguments.length, profile).T
    added = np.percentile(in_loop / bare - 1, [50, 25, 75])
    print(f"{1e3 * np.median(bare):.1f} ms a bare step, {1e3 * np.median(in_loop):.1f} ms in the "
          f"loop: {added[0]:.1%} more ({added[1]:.1%} to {added[2]:.1%})")
    if arguments.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
