"""A lock file that allows only one training process at a time in a run folder.

`run.lock` identifies the process that trains in the folder, and has a counter that this process
increments every few seconds. Operating system locks are not used, because gs:// has none and NFS
locks may outlive their host. A lock of this machine is stale if its process no longer exists. A
lock of another machine is stale if its counter has stopped, so that clocks of different machines
are never compared.

Only training acquires the lock; `sample`, `evaluate` and `export` may read a run folder that is in
use. If several processes train one model, process 0 acquires the lock for all. The module does not
import jax, so that a command can check the lock within milliseconds.
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
_BEAT = 2.0  # Seconds between two increments of the counter.
# Seconds without an increment after which a process of another machine counts as dead.
_STALE = 20.0
# Seconds to wait for a process that may be about to exit, as when a job is requeued.
_PATIENCE = 3.0
# Two processes that find a stale lock both write theirs. After this time the file shows which one
# has it.
_SETTLE = 1.0
_POLL = 0.2
# The last stale lock, so that the second check does not wait for it again.
_dead = {}


@contextlib.contextmanager
def held(workdir):
    """Holds the lock of a run folder, which is created if missing, while the context is open.

    Yields:
      () -> None, to be called before files of the folder are replaced. It raises a UserError if
      another process has acquired the lock, which may happen if this one was suspended for long.

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

    Waits a few seconds for a process that is about to exit, and longer for one of another machine
    whose counter has stopped. If several processes train one model, each may call it before they
    are connected, and only process 0 afterwards.

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
            # A short failure of a network share, or a full disk, must not end the thread.
            with contextlib.suppress(Exception):
                found = _read(self._path)
                if found is None or self._is_own(found):
                    self._count += 1
                    # Overwritten in place, so that it needs no disk space and is never empty.
                    self._write("w" if found is None else "r+")

    def _write(self, mode="w"):
        """Writes the lock; mode "x" creates it, "r+" overwrites one of the same length."""
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
    """Waits until a lock is free; returns None, or the content of a stale lock."""
    start, last, moved = time.monotonic(), None, False
    while (found := _read(path)) is not None:
        now = time.monotonic()
        if last is None:
            last, changed = found, now
        elif found != last:
            last, changed, moved = found, now, True
        alive = _is_alive(found)
        if alive is False or found and found == _dead:
            return found
        if (alive or moved) and now - start >= _PATIENCE:
            raise UserError(
                f"--workdir={path.parent} is in use: {_named(found)} trains there since "
                f"{found.get('since', 'an unknown time')}. Stop it, wait for its end, or give "
                "another --workdir"
            )
        if now - changed >= _STALE:
            _dead.clear()
            _dead.update(found)
            return found
        logging.log_first_n(
            logging.INFO, "%s belongs to %s; checking whether it is running", 1, path, _named(found)
        )
        time.sleep(_POLL)
    return None


def _read(path):
    """Returns the content of a lock, {} if it is being written, or None if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None  # The folder cannot be created; creating it will raise the error.
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(found):
    return f"process {found.get('pid', '?')} on {found.get('host', 'some machine')}"


def _is_alive(found):
    """Returns whether the process of a lock is running; None if unknown.

    It is unknown for a process of another machine and for a damaged lock.
    """
    if found.get("machine") != _machine() or not isinstance(found.get("pid"), int):
        return None
    started = _started(found["pid"])
    return started is not None and started == found.get("started")


def _machine():
    """Returns an id of this boot of the machine and of this PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.system()} {socket.gethostname()}"


def _started(pid):
    """Returns the start time of a process of this machine, since process ids are reused.

    None for a dead process. Without /proc it is "" for every running process.
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
