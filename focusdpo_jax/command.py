"""What every command of the package does the same way: quiet logs, and mistakes in one line."""

import ctypes
import glob
import logging as python_logging
import os
import platform
import sys
import zlib

from absl import app, flags, logging
from etils import epath

from focusdpo_jax import config_files, interrupts
from focusdpo_jax.errors import UserError
from focusdpo_jax.files import no_room

# Device files of GPUs (NVIDIA's, AMD's) and TPUs.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
# Of glibc's mallopt: no block is too large for the heap, the heap does not shrink, and all threads
# share it, since those of others cannot hold large blocks.
_KEEPS_MEMORY = (
    (-3, 2**31 - 1),  # M_MMAP_THRESHOLD
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
    (-8, 1),  # M_ARENA_MAX
)


def parse_flags(argv):
    """Parses the command line; whatever is wrong with it is one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()))


class _FoundByName(flags.ArgumentParser):
    """Reads a configuration by its path or its name; see `config_files.find`."""

    def __init__(self, reader):
        self._reader = reader

    def parse(self, argument):
        return self._reader.parse(config_files.find(argument))

    def flag_type(self):
        return self._reader.flag_type()


def config_parser(holder):
    """A `parser` for `run`, of a command that takes a configuration file, by path or by name.

    A configuration is Python, so that a mistake in it or in --config.FIELD can raise anything.

    Args:
      holder: of the flag, as `config_flags.DEFINE_config_file` returned it; it may be left out.
    """
    flag = flags.FLAGS[holder.name]
    flag.parser = _FoundByName(flag.parser)

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
            if holder.value is not None:
                holder.value.get("seed")  # A file that cannot be read fails at its first use.
            return rest
        except Exception as error:  # By absl, ml_collections or the configuration file.
            lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()]
            lines = [line for line in lines if line]
            if isinstance(error, AttributeError):  # Of --config.FIELD: the name, then a suggestion.
                name, *suggestion = (line.strip("\\'") for line in lines)
                fail(f"config.{name} is not a field. {' '.join(suggestion)}")
            fail(lines[-1].removeprefix("ValueError: ") if lines else repr(error))

    return parse


def default_workdir(config_file):
    """runs/toybox_dpo for toybox_dpo or configs/toybox_dpo.py; an argument after a colon is added."""
    path, _, argument = config_file.partition(":")
    name = epath.Path(path).stem
    return epath.Path("runs") / (f"{name}_{argument}" if argument else name)


def run(main, parser=parse_flags, *, goes_on=False):
    """Runs a command as the main program.

    Args:
      main: the command, a function without arguments. A `UserError` that it raises becomes one line
        on stderr and exit status 2; Ctrl-C one line and status 130 (see `interrupts`).
      parser: takes all arguments and returns those that are not flags.
      goes_on: whether the same command line goes on where it was interrupted.
    """
    interrupted = interrupts.Interrupts(
        "interrupted (Ctrl-C)"
        + ("; the same command goes on from what is there" if goes_on else "")
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_compiled_programs()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_quiet)

    def guarded(argv):
        if len(argv) > 1:
            fail(f"unexpected arguments: {' '.join(argv[1:])}; flags are written --name=value")
        with interrupted.one_line():
            try:
                main()
            except UserError as error:
                if interrupted.raised:
                    raise
                fail(error)

    with interrupted.one_line():
        app.run(guarded, flags_parser=parser)


def keep_compiled_programs():
    """Has jax keep what it compiles, so that a second start need not; before jax is imported.

    In ~/.cache/focusdpo_jax (below XDG_CACHE_HOME, where that is set), at most 4 GiB, the least used
    go first. jax's own variables change it: JAX_COMPILATION_CACHE_DIR the folder,
    JAX_ENABLE_COMPILATION_CACHE=false whether there is one.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
            home, "focusdpo_jax", f"programs-{_processor()}"
        )
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
    # Also small programs: there are hundreds, and reading one takes a third of compiling it.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def keep_memory():
    """Has a process that computes on its CPU keep memory that it gave back; before jax has devices.

    XLA takes what a program needs, hundreds of megabytes, from malloc and returns it after every step.
    glibc would hand it to the system each time, which then clears every page anew: a fifteenth of a
    large step. (All threads have one heap for that; small steps it slows down.) Elsewhere than with
    glibc, and beside an accelerator, nothing is changed; nor where the environment has a say about
    malloc.
    """
    told = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    if told or platform.libc_ver()[0] != "glibc" or _has_accelerator():
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _KEEPS_MEMORY:
        mallopt(parameter, value)


def _has_accelerator():
    """Whether jax would compute on something else than the CPU."""
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] != "cpu"
    return any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _processor():
    """What programs for this kind of processor are kept under: others may lack its instructions."""
    try:
        with open("/proc/cpuinfo") as lines:
            told = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        told = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(told.encode()):08x}"


def fail(message):
    """Ends the program with one line that says what was wrong."""
    leave(f"error: {message}", 2)


def leave(message, status):
    """Ends the program with one line and an exit status."""
    print(message, file=sys.stderr)
    sys.exit(status)


def _quiet(record):
    """Keeps what this program logs, and of the libraries' only warnings.

    Drops the traceback of a full disk in a library's thread, which the command reports as its error.
    """
    if record.exc_info and record.exc_info[1] and no_room(record.exc_info[1]):
        return False
    return record.levelno >= python_logging.WARNING or "focusdpo_jax" in record.pathname
