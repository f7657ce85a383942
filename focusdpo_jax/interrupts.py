"""Ctrl-C in a command: one line and exit status 130, whatever the process is doing.

Python delivers a signal when the main thread returns from C++, which may compile for minutes. So a thread
of its own reads signals from a pipe. The main thread gets a few seconds to clean up, then the process ends.
A second Ctrl-C ends it at once. Code that saves first, as training does, installs its own signal handler;
then only the second Ctrl-C ends the process here.
"""

import _thread
import contextlib
import multiprocessing
import os
import signal
import sys
import threading

# What a shell reports of a process that SIGINT has ended.
STATUS = 128 + signal.SIGINT
# Seconds in which the main thread can leave by itself.
_GRACE = 3.0


class Interrupts:
    """Ctrl-C from now on, in the process of a command; to be made in the main thread.

    Attributes:
      raised: whether the main thread was interrupted.
    """

    def __init__(self, line):
        """Takes over SIGINT; `line` is printed at the end."""
        self._line, self._asked, self.raised = line, 0, False
        self._leaving = threading.Lock()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGINT, self._raise)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self._report, sys.unraisablehook = sys.unraisablehook, self._unraisable

    @contextlib.contextmanager
    def one_line(self):
        """Ends the process where the body was interrupted, whatever libraries made of that."""
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if self.raised or isinstance(error, KeyboardInterrupt):
                self._leave()
            raise

    def _raise(self, number, frame):
        self.raised = True
        raise KeyboardInterrupt

    def _unraisable(self, info):
        """Repeats an interrupt that Python could not raise, as in a destructor, and would only print."""
        if info.exc_type is not KeyboardInterrupt:
            self._report(info)
            return
        timer = threading.Timer(0.1, self._repeat)
        timer.daemon = True
        timer.start()

    def _repeat(self):
        """Raises again in the main thread, which is elsewhere by now."""
        self._asked -= 1  # `_listen` counts it.
        _thread.interrupt_main()

    def _listen(self, reader):
        while True:
            for number in os.read(reader, 64):
                if number != signal.SIGINT:
                    continue
                self._asked += 1
                if self._asked > 1:
                    self._leave()
                if signal.getsignal(signal.SIGINT) == self._raise:
                    timer = threading.Timer(_GRACE, self._leave)
                    timer.daemon = True
                    timer.start()

    def _leave(self):
        self._leaving.acquire()  # For good: one line is enough.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            print(("\n" if sys.stderr.isatty() else "") + self._line, file=sys.stderr, flush=True)
        for process in multiprocessing.active_children():
            process.kill()
        os._exit(STATUS)  # Threads that compile or read would hold up any other end.


@contextlib.contextmanager
def kept_from_children():
    """Processes that are started inside never see Ctrl-C, which a terminal sends to all of them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
