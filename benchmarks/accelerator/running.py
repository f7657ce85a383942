"""Jobs in processes of their own, and the record of what they found.

Whatever happens to a job, a crash, want of memory, no end, costs its own rows alone: the record is
written after every row, and the next job starts in a fresh process with the whole device.
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

# Before a row on a job's standard output, where libraries may print, too.
MARK = "ROW "
# Least time in which starting another job makes sense.
_LEAST = 20
_TAIL = 4000


class Record:
    """accelerator.json and accelerator.md of a folder: what was found on one device.

    The JSON is {"device": {...}, "jobs": {name: {"part", "settings", "status", "seconds", "error",
    "rows"}}}. A status is "done", "failed", "stopped" (out of time) or "running". A row with "earlier" is
    of an attempt before the last.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Takes the folder; what it holds already is kept."""
        self.folder = pathlib.Path(folder)
        self._path = self.folder / "accelerator.json"
        self.values = {"device": {}, "jobs": {}}
        if self._path.exists():
            self.values = json.loads(self._path.read_text())

    @property
    def log(self):
        """The file with all that jobs print."""
        return self.folder / "accelerator.log"

    def is_done(self, job):
        """Whether a job was measured with these settings."""
        found = self.values["jobs"].get(job.name, {})
        return found.get("status") == "done" and found["settings"] == job.settings

    def start(self, job) -> None:
        """A job runs. What it found before stays until it finds the same again, or is done."""
        before = self.values["jobs"].pop(job.name, {})
        rows = before["rows"] if before.get("settings") == job.settings else []
        self.values["jobs"][job.name] = {
            "part": job.part,
            "settings": job.settings,
            "status": "running",
            "rows": [row | {"earlier": True} for row in rows],
        }
        self.save()

    def add(self, job, row) -> None:
        """A row of a job; one of the same "key" takes the place of the earlier."""
        if job.part == "device":
            self._on(row, job)
        rows = self.values["jobs"][job.name]["rows"]
        rows[:] = [other for other in rows if other["key"] != row["key"]] + [row]
        self.save()

    def _on(self, device, job):
        """Begins anew where the device or a library is another; what was found is kept aside."""
        before, kept = self.values["device"], ("name", "versions")
        if before and any(before[name] != device[name] for name in kept):
            stem = "accelerator before " + time.strftime("%Y-%m-%d %H.%M.%S")
            replace_file(self.folder / f"{stem}.json", json.dumps(self.values, indent=1) + "\n")
            self.values["jobs"] = {job.name: self.values["jobs"][job.name]}
        self.values["device"] = device

    def end(self, job, status, seconds, error=None) -> None:
        """What became of a job."""
        found = self.values["jobs"][job.name]
        if status == "done":
            found["rows"] = [row for row in found["rows"] if not row.get("earlier")]
        found |= {"status": status, "seconds": round(seconds, 1)} | (
            {"error": error} if error else {}
        )
        self.save()

    def save(self) -> None:
        """Writes both files, each in one move."""
        replace_file(self._path, json.dumps(self.values, indent=1) + "\n")
        replace_file(self.folder / "accelerator.md", table.of(self.values))


def run(command: list[str], seconds, log: pathlib.Path, add):
    """Runs a job's process, with all that it starts, for so long at most.

    Args:
      command: list of arguments.
      log: path of a file, to which its standard error and whatever is no row are added.
      add: called with each row as it comes.

    Returns:
      (status, error): see `Record`; the error is the last line that it printed.
    """
    deadline = time.monotonic() + seconds
    others = []
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
                others.append(line)
        code = process.wait(timeout=max(deadline - time.monotonic(), 1))
    except (queue.Empty, subprocess.TimeoutExpired):
        code = None
    finally:
        _end(process)
    printed = pathlib.Path(log).read_bytes()[start:][-_TAIL:].decode(errors="replace")
    with open(log, "a") as file:
        file.writelines(others)
    if code == 0:
        return "done", None
    if code is None:
        return "stopped", f"not done after {seconds:.0f} s"
    said = [line.strip() for line in printed.splitlines() if line.strip()]
    return "failed", f"exit status {code}" + (f": {said[-1][:300]}" if said else "")


def _end(process):
    """Ends a process and those it has started, which are of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_all(jobs, record, command_of, seconds, *, again: bool = False, say=print) -> None:
    """Runs jobs one after the other as long as there is time; the record has what they found.

    Args:
      command_of: (job, seconds) -> list of arguments.
      seconds: for all of them.
      again: also those that are done.
    """
    deadline = time.monotonic() + seconds
    for job in jobs:
        if record.is_done(job) and not again:
            say(f"{job.name}: done before")
            continue
        left = deadline - time.monotonic()
        if left < _LEAST and job.seconds > left:
            say(f"{job.name}: no time left")
            continue
        limit = min(job.seconds, left)
        record.start(job)
        start = time.monotonic()
        status, error = run(
            command_of(job, limit), limit, record.log, lambda row, job=job: record.add(job, row)
        )
        record.end(job, status, time.monotonic() - start, error)
        say(
            f"{job.name}: {status} in {time.monotonic() - start:.0f} s"
            + (f" ({error})" if error else "")
        )
