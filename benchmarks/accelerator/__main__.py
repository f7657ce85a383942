r"""Measures correctness, speed and memory on a machine with a GPU.

    python -m benchmarks.accelerator --minutes=10                      # from the repository's root
    python -m benchmarks.accelerator --parts attention step-1024       # selected parts or jobs
    python -m benchmarks.accelerator --size=debug                      # a test on a CPU

    attention   time and error of each attention of SDXL's networks, compared with XLA's kernel
    step        a step that trains the adapter at 1024 and 512 px, compared with diffusers if it is
                installed
    sampling    one image, and the autoencoder's decoder by itself
    variants    the step without remat, with LoRA, with all parameters, with FocusDPO's weights, and
                with unrolled blocks

docs/performance.md ("On an accelerator") lists the requirements. Results are written to
accelerator.json and accelerator.md in `--output` after every measurement, the output of all jobs to
accelerator.log. Each job is a process with its own time limit. A second run on the same device with
the same settings measures only missing and failed jobs; `--again` measures all of them.
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


def parse(arguments=None):
    """Parses the command line; `jobs` are the selected jobs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10, help="time limit of all jobs")
    parser.add_argument("--output", default="runs/accelerator", help="folder of the results")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(job_list.PARTS),
        help=f"parts ({', '.join(job_list.PARTS)}) or names of jobs",
    )
    parser.add_argument("--size", choices=job_list.SIZES, default="full")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=step.PEERS,
        help="how diffusers' step is compiled: not at all, by torch.compile of each repeated "
        "block, or of the whole step, which takes minutes; default: the latter two, with "
        "--size=debug the first",
    )
    parser.add_argument("--again", action="store_true", help="repeat finished jobs")
    # For the process of a job.
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.peers is None:
        flags.peers = ["eager"] if flags.size == "debug" else ["regional", "compiled"]
    try:
        flags.jobs = job_list.select(job_list.all_jobs(flags.size, flags.peers), flags.parts)
    except ValueError as error:
        parser.error(f"--parts: {error}")
    return flags


def run_job(flags) -> None:
    """Runs one job in its own process and prints its rows."""
    # Set before importing jax: no preallocation, since a peer process may use the same device.
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
    """Runs the jobs in processes; this process does not use the device."""
    start = time.monotonic()
    record = running.Record(flags.output)
    record.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="accelerator-") as scratch:

        def job_command(job, seconds):
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

        def seconds_left():
            return 60 * flags.minutes - (time.monotonic() - start)

        running.run_all(
            [job_list.DEVICE], record, job_command, seconds_left(), again=True, report=report
        )
        running.run_all(
            flags.jobs, record, job_command, seconds_left(), again=flags.again, report=report
        )
    print(
        f"\n{record.folder / 'accelerator.md'}:\n\n"
        + (record.folder / "accelerator.md").read_text()
    )


def report(line) -> None:
    """Prints a line of progress with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    """Runs all selected jobs, or a single one (`--job`)."""
    flags = parse()
    flags.output = str(pathlib.Path(flags.output).absolute())
    os.chdir(ROOT)  # Jobs are started with `-m benchmarks.accelerator`.
    if flags.job:
        run_job(flags)
    else:
        coordinate(flags)


if __name__ == "__main__":
    main()
