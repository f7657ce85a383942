"""Runs jobs in separate processes and records their results.

If a job crashes, runs out of memory or does not end, only its own rows are affected: the record is
written after every row, and the next job starts in a new process with the whole device.
"""

import json
import os
import pathlib
import queue
import signal
import subprocess
import threading
import time

from focusdpo_jax.files import replace_file

from . import table

# Marks rows on the standard output of a job, to which libraries may print, too.
MARK = "ROW "
# With less time left, a job is started only if its time limit fits.
_LEAST_SECONDS = 20
_TAIL_BYTES = 4000


class Record:
    """Results on one device, in accelerator.json and accelerator.md of a folder.

    The JSON is {"device": {...}, "jobs": {name: {"part", "settings", "status", "seconds", "error",
    "rows"}}}. A status is "done", "failed", "stopped" (out of time) or "running". A row with
    "earlier" is from a previous attempt.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Reads the existing record in the folder, if any."""
        self.folder = pathlib.Path(folder)
        self._path = self.folder / "accelerator.json"
        self.values = {"device": {}, "jobs": {}}
        if self._path.exists():
            self.values = json.loads(self._path.read_text())

    @property
    def log(self):
        """The file with the output of all jobs."""
        return self.folder / "accelerator.log"

    def is_done(self, job):
        """Whether a job has finished with its current settings."""
        job_record = self.values["jobs"].get(job.name, {})
        return job_record.get("status") == "done" and job_record["settings"] == job.settings

    def start(self, job) -> None:
        """Marks a job as running. Previous rows stay until they are replaced or the job is done."""
        previous = self.values["jobs"].pop(job.name, {})
        rows = previous["rows"] if previous.get("settings") == job.settings else []
        self.values["jobs"][job.name] = {
            "part": job.part,
            "settings": job.settings,
            "status": "running",
            "rows": [row | {"earlier": True} for row in rows],
        }
        self.save()

    def add(self, job, row) -> None:
        """Adds a row of a job, which replaces a row with the same "key"."""
        if job.part == "device":
            self._set_device(row, job)
        rows = self.values["jobs"][job.name]["rows"]
        rows[:] = [other for other in rows if other["key"] != row["key"]] + [row]
        self.save()

    def _set_device(self, device, job):
        """Starts a new record if the device or a library has changed, and saves the old one."""
        previous, compared = self.values["device"], ("name", "versions")
        if previous and any(previous[name] != device[name] for name in compared):
            stem = "accelerator before " + time.strftime("%Y-%m-%d %H.%M.%S")
            replace_file(self.folder / f"{stem}.json", json.dumps(self.values, indent=1) + "\n")
            self.values["jobs"] = {job.name: self.values["jobs"][job.name]}
        self.values["device"] = device

    def end(self, job, status, seconds, error=None) -> None:
        """Records the status of a finished job."""
        job_record = self.values["jobs"][job.name]
        if status == "done":
            job_record["rows"] = [row for row in job_record["rows"] if not row.get("earlier")]
        job_record |= {"status": status, "seconds": round(seconds, 1)} | (
            {"error": error} if error else {}
        )
        self.save()

    def save(self) -> None:
        """Writes both files atomically."""
        replace_file(self._path, json.dumps(self.values, indent=1) + "\n")
        replace_file(self.folder / "accelerator.md", table.render(self.values))


def run(command: list[str], seconds, log: pathlib.Path, add):
    """Runs the process of a job with a time limit, then kills it with all its child processes.

    Args:
      command: list of arguments.
      seconds: time limit.
      log: file to which standard error and all lines that are no rows are appended.
      add: called with each row when it is printed.

    Returns:
      (status, error): see `Record`. The error ends with the last line on standard error.
    """
    deadline = time.monotonic() + seconds
    other_lines = []
    with open(log, "ab") as errors:
        errors.write(f"\n==== {' '.join(map(str, command))}\n".encode())
        errors.flush()
        start = errors.tell()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    lines = queue.Queue()
    output = process.stdout
    assert output is not None

    def read():
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get(timeout=max(deadline - time.monotonic(), 0))) is not None:
            if line.startswith(MARK):
                add(json.loads(line.removeprefix(MARK)))
            else:
                other_lines.append(line)
        code = process.wait(timeout=max(deadline - time.monotonic(), 1))
    except (queue.Empty, subprocess.TimeoutExpired):
        code = None
    finally:
        _kill(process)
    printed = pathlib.Path(log).read_bytes()[start:][-_TAIL_BYTES:].decode(errors="replace")
    with open(log, "a") as file:
        file.writelines(other_lines)
    if code == 0:
        return "done", None
    if code is None:
        return "stopped", f"not done after {seconds:.0f} s"
    error_lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return "failed", f"exit status {code}" + (f": {error_lines[-1][:300]}" if error_lines else "")


def _kill(process):
    """Kills a process and its child processes, which belong to its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_all(jobs, record, job_command, seconds, *, again: bool = False, report=print) -> None:
    """Runs jobs one after the other until the time is over.

    Args:
      jobs: list of Job.
      record: Record to which results are written.
      job_command: (job, seconds) -> list of arguments.
      seconds: time limit of all jobs.
      again: whether to repeat finished jobs.
      report: called with each line of progress.
    """
    deadline = time.monotonic() + seconds
    for job in jobs:
        if record.is_done(job) and not again:
            report(f"{job.name}: done before")
            continue
        seconds_left = deadline - time.monotonic()
        if seconds_left < _LEAST_SECONDS and job.seconds > seconds_left:
            report(f"{job.name}: no time left")
            continue
        limit = min(job.seconds, seconds_left)
        record.start(job)
        start = time.monotonic()
        status, error = run(
            job_command(job, limit), limit, record.log, lambda row, job=job: record.add(job, row)
        )
        record.end(job, status, time.monotonic() - start, error)
        report(
            f"{job.name}: {status} in {time.monotonic() - start:.0f} s"
            + (f" ({error})" if error else "")
        )
