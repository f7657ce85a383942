"""Ctrl-C in a command: one line and exit status 130, even during a long compilation.

Python delivers a signal when the main thread returns from C++, which may compile for minutes. So
another thread reads signals from a pipe. The main thread has a few seconds to clean up, then the
process ends. A second Ctrl-C ends it at once. Code that saves first, such as training, installs its
own signal handler; then only the second Ctrl-C ends the process here.
"""

import _thread
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

# The exit status that shells report for a process ended by SIGINT.
STATUS = 128 + signal.SIGINT
# Seconds for the main thread to clean up and exit.
_GRACE = 3.0
# A warning of multiprocessing's resource tracker, a process that removes the semaphores of a
# process that ended without cleaning up, as `_leave` does.
_TRACKER_WARNING = "ignore:resource_tracker:UserWarning"


class Interrupts:
    """Handles SIGINT in the process of a command; create it in the main thread.

    Attributes:
      raised: whether the main thread was interrupted.
    """

    def __init__(self, line: str):
        """Installs the handler.

        Args:
          line: printed when an interrupt ends the process.
        """
        self._line, self._received, self.raised = line, 0, False
        self._leaving = threading.Lock()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGINT, self._raise)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self._report, sys.unraisablehook = sys.unraisablehook, self._unraisable
        filters = filter(None, (os.environ.get("PYTHONWARNINGS"), _TRACKER_WARNING))
        os.environ["PYTHONWARNINGS"] = ",".join(filters)

    @contextlib.contextmanager
    def exit_on_interrupt(self) -> Iterator[None]:
        """Ends the process if the body was interrupted, even if a library raised another error."""
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if self.raised or isinstance(error, KeyboardInterrupt):
                self._leave()
            raise

    def _raise(self, number: int, frame: Any) -> NoReturn:
        self.raised = True
        raise KeyboardInterrupt

    def _unraisable(self, info: Any) -> None:
        """Repeats an interrupt that Python only prints, because it cannot raise in a destructor."""
        if info.exc_type is not KeyboardInterrupt:
            self._report(info)
            return
        timer = threading.Timer(0.1, self._repeat)
        timer.daemon = True
        timer.start()

    def _repeat(self) -> None:
        """Interrupts the main thread again, which by now executes other code."""
        self._received -= 1  # `_listen` counts it again.
        _thread.interrupt_main()

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number != signal.SIGINT:
                    continue
                self._received += 1
                if self._received > 1:
                    self._leave()
                if signal.getsignal(signal.SIGINT) == self._raise:
                    timer = threading.Timer(_GRACE, self._leave)
                    timer.daemon = True
                    timer.start()

    def _leave(self) -> NoReturn:
        self._leaving.acquire()  # Never released, so that only one thread prints the line.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            print(("\n" if sys.stderr.isatty() else "") + self._line, file=sys.stderr, flush=True)
        for process in multiprocessing.active_children():
            process.kill()
        os._exit(STATUS)  # `sys.exit` would wait for threads that compile or read.


@contextlib.contextmanager
def children_without_sigint() -> Iterator[None]:
    """Blocks SIGINT in processes started inside the context.

    A terminal sends Ctrl-C to all processes of a command.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
