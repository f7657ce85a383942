"""Shared entry point of the commands: flags, logging, one-line errors, and process settings."""

import ctypes
import glob
import logging as python_logging
import os
import platform
import sys
import zlib
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from etils import epath

from focusdpo_jax import config_files, interrupts
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import no_room

# Device files of GPUs (NVIDIA's, AMD's) and TPUs.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
# Parameters of glibc's mallopt. The heap takes blocks of any size, never shrinks, and is shared by
# all threads, since the arenas of other threads cannot have large blocks.
_KEEP_MEMORY = (
    (-3, 2**31 - 1),  # M_MMAP_THRESHOLD
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
    (-8, 1),  # M_ARENA_MAX
)

# Parses the arguments and returns those that are not flags.
Parser = Callable[[list[str]], list[str]]


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; an invalid flag ends the program with one line.

    Returns:
      The arguments that are not flags.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()))


class _FoundByName(flags.ArgumentParser):
    """Reads a configuration by its path or its name; see `config_files.find`."""

    def __init__(self, reader: flags.ArgumentParser):
        self._reader = reader

    def parse(self, argument: str):
        return self._reader.parse(config_files.find(argument))

    def flag_type(self) -> str:
        return self._reader.flag_type()


def config_parser(holder: flags.FlagHolder) -> Parser:
    """Returns a parser for `run` for commands with a configuration file, by path or by name.

    A configuration is Python code, so that a mistake in it or in --config.FIELD can raise any
    exception. The parser ends the program with one line for all of them.

    Args:
      holder: holder of the flag, from `config_flags.DEFINE_config_file`; the flag may be optional.
    """
    flag = flags.FLAGS[holder.name]
    flag.parser = _FoundByName(flag.parser)

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if holder.value is not None:
                holder.value.get("seed")  # A file that cannot be read fails at its first use.
            return rest
        except Exception as error:  # From absl, ml_collections or the configuration file.
            lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()]
            lines = [line for line in lines if line]
            # From --config.FIELD: the name, then a suggestion.
            if isinstance(error, AttributeError):
                name, *suggestion = (line.strip("\\'") for line in lines)
                fail(f"config.{name} is not a field. {' '.join(suggestion)}")
            fail(lines[-1].removeprefix("ValueError: ") if lines else repr(error))

    return parse


def default_workdir(config_file: str) -> epath.Path:
    """Returns the default folder of a run: runs/toybox_dpo for toybox_dpo.

    An argument after a colon is appended: runs/sdxl_dpo_debug for configs/sdxl_dpo.py:debug.
    """
    path, _, argument = config_file.partition(":")
    name = epath.Path(path).stem
    return epath.Path("runs") / (f"{name}_{argument}" if argument else name)


def run(main: Callable[[], None], parser: Parser = parse_flags, *, resumable: bool = False) -> None:
    """Runs a command as the main program.

    Args:
      main: the command. A `UserError` that it raises becomes one line on stderr and exit status 2,
        Ctrl-C one line and status 130 (see `interrupts`).
      parser: parses the arguments and returns those that are not flags.
      resumable: whether the same command line resumes after an interrupt, for the message.
    """
    interrupted = interrupts.Interrupts(
        "interrupted (Ctrl-C)" + ("; run the same command again to resume" if resumable else "")
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_compiled_programs()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_quiet)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected arguments: {' '.join(argv[1:])}; flags are written --name=value")
        with interrupted.exit_on_interrupt():
            try:
                main()
            except UserError as error:
                if interrupted.raised:
                    raise
                fail(error)

    with interrupted.exit_on_interrupt():
        app.run(guarded, flags_parser=parser)


def keep_compiled_programs() -> None:
    """Enables jax's persistent compilation cache; call it before jax is imported.

    The cache is in ~/.cache/focusdpo_jax (or below XDG_CACHE_HOME, if set), and has at most 4 GiB;
    the least recently used programs are removed first. jax's environment variables override this:
    JAX_COMPILATION_CACHE_DIR the folder, JAX_ENABLE_COMPILATION_CACHE=false the cache itself.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
            home, "focusdpo_jax", f"programs-{_processor()}"
        )
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
    # Small programs, too: there are hundreds, and loading one takes a third of the time to compile
    # it.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def keep_memory() -> None:
    """Makes malloc keep freed memory, for CPU training; call it before jax creates its devices.

    XLA allocates the buffers of a program, hundreds of megabytes, with malloc and frees them after
    every step. By default glibc returns them to the system, which then clears every page again: a
    fifteenth of a large step. (The cost is one heap for all threads, which slows small steps down.)
    Nothing is changed without glibc, with an accelerator, or if the environment configures malloc.
    """
    configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if configured or platform.libc_ver()[0] != "glibc" or _has_accelerator():
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _KEEP_MEMORY:
        mallopt(parameter, value)


def _has_accelerator() -> bool:
    """Returns whether jax would compute on another device than the CPU."""
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] != "cpu"
    return any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _processor() -> str:
    """Returns a key for the processor's instruction set, which compiled programs depend on."""
    try:
        with open("/proc/cpuinfo") as lines:
            features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def fail(message: object) -> NoReturn:
    """Prints "error: MESSAGE" on one line and exits with status 2."""
    leave(f"error: {message}", 2)


def leave(message: str, status: int) -> NoReturn:
    """Prints a line on stderr and exits with `status`."""
    print(message, file=sys.stderr)
    sys.exit(status)


def _quiet(record: python_logging.LogRecord) -> bool:
    """Filters the log: all records of this package, but only warnings of libraries.

    It also drops the traceback of a full disk in a library's thread, which the command reports as
    its error.
    """
    if record.exc_info and record.exc_info[1] and no_room(record.exc_info[1]):
        return False
    return record.levelno >= python_logging.WARNING or "focusdpo_jax" in record.pathname
