"""One start at a time in a run folder.

`run.lock` names the process that trains there and has a counter, which that process increments every few
seconds while it lives. No lock of the operating system is used, because gs:// has none and that of NFS may
outlive its host. A lock of this machine is stale when its process is gone. A lock of another machine is stale
when its counter stands still, so that clocks of different machines are never compared.

Only training takes it: `sample`, `evaluate` and `export` read a run folder that is in use. Of several
processes that train one model process 0 takes it for all. Imports no jax, so that a command can look at it
before anything that takes seconds.
"""

import contextlib
import json
import os
import platform
import socket
import threading
import time
import uuid

from absl import logging
from etils import epath

from focusdpo_jax.errors import UserError
from focusdpo_jax.files import cannot_write

NAME = "run.lock"
_BEAT = 2.0  # Seconds between two counts.
# A process of another machine that has not counted for so long is taken for dead.
_STALE = 20.0
# How long a start waits for one that may be about to leave, as when a job is queued again.
_PATIENCE = 3.0
# Two starts that find a dead lock at once write theirs; who is read after this time has it.
_SETTLE = 1.0
_POLL = 0.2
# The last stale lock, so that the second check does not wait for it again.
_dead = {}


@contextlib.contextmanager
def held(workdir):
    """While it is open, this start is the only one in a run folder, which is made if missing.

    Yields:
      () -> None, to be called before anything is replaced that another start could have written; it raises
      a UserError where another one has taken the folder, because this one was stopped for long.

    Raises:
      UserError: another process trains there, or the folder cannot be written.
    """
    from focusdpo_jax.sharding import processes  # Imports jax.

    if not processes.is_first():
        yield lambda: None
        return
    lock = _Lock(epath.Path(workdir))
    try:
        lock.take()
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error
    try:
        yield lock.check
    finally:
        lock.release()


def require_free(workdir):
    """Checks that no other process trains in a run folder; writes nothing.

    Waits a few seconds for one that is about to leave, and longer for one of another machine that shows no
    sign of life. Of several processes that train one model each may ask before they have found each other,
    and process 0 alone afterwards.

    Raises:
      UserError: another process trains there, or the folder cannot be read.
    """
    try:
        _wait(epath.Path(workdir) / NAME)
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error


class _Lock:
    """The lock of this process."""

    def __init__(self, workdir):
        self._path, self._count = workdir / NAME, 0
        self._own = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": uuid.uuid4().hex,
        }
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            dead = _wait(self._path)
            if dead is None and not _in_cloud(self._path):
                try:
                    self._write("x")
                except FileExistsError:
                    continue
                break
            if _read(self._path) == dead:
                self._write()
                time.sleep(_SETTLE)
                if self._is_own(_read(self._path)):
                    break
        self._thread.start()

    def check(self):
        found = _read(self._path)
        if found is not None and not self._is_own(found):
            raise UserError(
                f"--workdir={self._path.parent} was taken by {_named(found)} while this process "
                "had stopped; nothing more is written here"
            )

    def release(self):
        self._left.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_own(_read(self._path)):
                self._path.unlink()

    def _beat(self):
        while not self._left.wait(_BEAT):
            # A share that is away for a moment, or a disk that is full, is no reason to stop.
            with contextlib.suppress(Exception):
                found = _read(self._path)
                if found is None or self._is_own(found):
                    self._count += 1
                    # In place, so that it needs no disk space and is never empty.
                    self._write("w" if found is None else "r+")

    def _write(self, mode="w"):
        """Writes the lock: "x" where there must be none, "r+" over one of the same length."""
        text = json.dumps(self._own | {"count": f"{self._count:010d}"}) + "\n"
        if _in_cloud(self._path):
            self._path.write_text(text)  # An object is replaced as a whole.
            return
        with open(self._path, mode) as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                if mode == "x":
                    self._path.unlink(missing_ok=True)
                raise

    def _is_own(self, found):
        return found is not None and found.get("token") == self._own["token"]


def _wait(path):
    """Returns when a lock is free: None, or the content of a stale one; see `require_free`."""
    began, last, moved = time.monotonic(), None, False
    while (found := _read(path)) is not None:
        now = time.monotonic()
        if last is None:
            last, changed = found, now
        elif found != last:
            last, changed, moved = found, now, True
        alive = _is_alive(found)
        if alive is False or found and found == _dead:
            return found
        if (alive or moved) and now - began >= _PATIENCE:
            raise UserError(
                f"--workdir={path.parent} is in use: {_named(found)} trains there since "
                f"{found.get('since', 'some time ago')}. Stop it, wait for its end, or give "
                "another --workdir"
            )
        if now - changed >= _STALE:
            _dead.clear()
            _dead.update(found)
            return found
        logging.log_first_n(
            logging.INFO, "%s is of %s; looking whether it is alive", 1, path, _named(found)
        )
        time.sleep(_POLL)
    return None


def _read(path):
    """The content of a lock; {} of one that is being written, None where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None  # The folder cannot be made; making it raises the error.
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(found):
    return f"process {found.get('pid', '?')} on {found.get('host', 'some machine')}"


def _is_alive(found):
    """Whether the process of a lock lives; None where it is of another machine, or the lock is damaged."""
    if found.get("machine") != _machine() or not isinstance(found.get("pid"), int):
        return None
    started = _started(found["pid"])
    return started is not None and started == found.get("started")


def _machine():
    """The current start of this machine, and the container whose process numbers are ours."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.system()} {socket.gethostname()}"


def _started(pid):
    """Start time of a process of this machine, which distinguishes it from a later one with its number.

    None for a dead process. Where there is no /proc, "" for every live process.
    """
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _in_cloud(path):
    return "://" in os.fspath(path)
