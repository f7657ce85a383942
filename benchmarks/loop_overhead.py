"""How much of a run's time is not its compiled step: loading, placing, dispatching, logging.

    python benchmarks/loop_overhead.py                 # SDXL's debug sizes
    python benchmarks/loop_overhead.py --profile       # and where the time between steps goes

Runs the real loop, and waits for every step's result before it goes on, so that nothing hides behind
the step as it otherwise does: the share is an upper bound. Saving and drawing, which a run does
seldom, are left out. The first steps are not counted.
"""

import argparse
import cProfile
import itertools
import pstats
import tempfile
import time

import jax
import numpy as np
from benchmark_cases import load_config

from focusdpo_jax.training import loop
from focusdpo_jax.training.step import Step

WARMUP = 10


def run(config, profile):
    """[(start, end)] of every step of a run."""
    times, call = [], Step.__call__

    def timed(step, *arguments):
        if profile and len(times) >= WARMUP:
            profile.disable()
        start = time.perf_counter()
        result = jax.block_until_ready(call(step, *arguments))
        times.append((start, time.perf_counter()))
        if profile and len(times) >= WARMUP:
            profile.enable()
        return result

    Step.__call__ = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.data.path = f"{folder}/data"
            loop.run(config, f"{folder}/run")
    finally:
        Step.__call__ = call
        if profile:
            profile.disable()
    return times[WARMUP:]


def main():
    """Prints the share of the time between steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["sdxl_dpo", "debug"],
                        help="name in configs/, and its argument")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    config = load_config(*arguments.config)
    # Of the last step's end only the loop is wanted, neither checkpoint nor picture.
    config.update({"steps": arguments.steps, "log_every": 10, "sample_every": 10**6,
                   "checkpoint_every": 10**6})
    config.evaluation.update({"pictures": 0, "scenes": 0})
    profile = cProfile.Profile() if arguments.profile else None
    times = run(config, profile)
    inside = np.array([end - start for start, end in times])
    between = np.array([later[0] - earlier[1] for earlier, later in itertools.pairwise(times)])
    print(f"step {1e3 * np.median(inside):.1f} ms, between steps {1e3 * np.median(between):.2f} ms "
          f"(at most {1e3 * between.max():.1f}): {between.sum() / (times[-1][1] - times[0][0]):.2%} "
          "of the time is not the compiled step")
    if profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    main()
