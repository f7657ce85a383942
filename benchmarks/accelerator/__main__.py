r"""One command for a machine with a GPU: is it right, how fast is it, and does it fit?

    python -m benchmarks.accelerator --minutes=10                      # from the repository's root
    python -m benchmarks.accelerator --parts attention step-1024       # parts, or single jobs
    python -m benchmarks.accelerator --size=debug                      # a rehearsal, on a CPU

    attention   every attention of SDXL's networks: the chosen kernel beside XLA's, and its error
    step        the adapter's step at 1024 and 512 px, beside diffusers where it is installed
    sampling    one image, with the autoencoder's decoder
    variants    the step without remat, of LoRA, of all parameters, as FocusDPO, with unrolled blocks

docs/performance.md ("On an accelerator") says what has to be installed. Every measurement is written as
it comes, to accelerator.json and accelerator.md of `--output`, with what was printed in accelerator.log.
Jobs are processes with time limits of their own. A second run keeps what is done, on the same device
with the same settings, and measures what is missing or failed; `--again` measures all of it.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import step

from . import jobs as job_list
from . import running

ROOT = pathlib.Path(__file__).parents[2]


def parsed(arguments=None):
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10, help="for everything")
    parser.add_argument("--output", default="runs/accelerator", help="folder of the results")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(job_list.PARTS),
        help=f"of {', '.join(job_list.PARTS)}; or names of jobs",
    )
    parser.add_argument("--size", choices=job_list.SIZES, default="full")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=step.PEERS,
        help="how diffusers steps: without torch.compile, with that of each repeated "
        "block, or of the whole step, which takes minutes; the latter two unless "
        "given, the first for a rehearsal",
    )
    parser.add_argument("--again", action="store_true", help="also what is done")
    # Of a job's process.
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.peers is None:
        flags.peers = ["eager"] if flags.size == "debug" else ["regional", "compiled"]
    try:
        flags.jobs = job_list.chosen(job_list.all_jobs(flags.size, flags.peers), flags.parts)
    except ValueError as error:
        parser.error(f"--parts: {error}")
    return flags


def work(flags) -> None:
    """A job's process: prints its rows."""
    # Before jax is imported: a peer wants memory, too, and alone we may have nearly all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from focusdpo_jax import command

    command.keep_compiled_programs()
    (job,) = [
        job
        for job in (job_list.DEVICE, *job_list.all_jobs(flags.size, flags.peers))
        if job.name == flags.job
    ]
    rows, sys.stdout = sys.stdout, sys.stderr
    context = job_list.Context(flags.seconds, flags.scratch)
    for row in job.measure(context):
        print(running.MARK + json.dumps(row), file=rows, flush=True)


def coordinate(flags) -> None:
    """Runs the jobs, which alone touch the device."""
    start = time.monotonic()
    record = running.Record(flags.output)
    record.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="accelerator-") as scratch:

        def command_of(job, seconds):
            return [
                sys.executable,
                "-m",
                "benchmarks.accelerator",
                f"--job={job.name}",
                f"--size={flags.size}",
                f"--seconds={seconds:.0f}",
                f"--scratch={scratch}",
                "--peers",
                *flags.peers,
            ]

        def left():
            return 60 * flags.minutes - (time.monotonic() - start)

        running.run_all([job_list.DEVICE], record, command_of, left(), again=True, say=say)
        running.run_all(flags.jobs, record, command_of, left(), again=flags.again, say=say)
    print(
        f"\n{record.folder / 'accelerator.md'}:\n\n"
        + (record.folder / "accelerator.md").read_text()
    )


def say(line) -> None:
    """To whoever waits."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    """Either of the two."""
    flags = parsed()
    flags.output = str(pathlib.Path(flags.output).absolute())
    os.chdir(ROOT)  # Where `-m benchmarks.accelerator` is found, wherever it was started.
    if flags.job:
        work(flags)
    else:
        coordinate(flags)


if __name__ == "__main__":
    main()
