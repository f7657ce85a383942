"""What every command of the package does the same way: quiet logs, and mistakes in one line."""

import logging as python_logging
import os
import sys

from absl import app, flags, logging

from focusdpo_jax.errors import UserError


def parse_flags(argv):
    """Parses the command line; whatever is wrong with it is one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split()))


def run(main, parser=parse_flags):
    """Runs a command as the main program.

    Args:
      main: the command, a function without arguments. A `UserError` that it raises becomes one line
        on stderr and exit status 2.
      parser: takes all arguments and returns those that are not flags.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_quiet)

    def guarded(argv):
        if len(argv) > 1:
            fail(f"unexpected arguments: {' '.join(argv[1:])}; flags are written --name=value")
        try:
            main()
        except UserError as error:
            fail(error)

    app.run(guarded, flags_parser=parser)


def fail(message):
    """Ends the program with one line that says what was wrong."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _quiet(record):
    """Keeps what this program logs, and of the libraries' only warnings."""
    return record.levelno >= python_logging.WARNING or "focusdpo_jax" in record.pathname
