"""Exceptions for mistakes of the user, in contrast to faults of the program."""


class UserError(Exception):
    """A mistake that the user can correct: an invalid field, a missing file, a corrupt record.

    Commands print its message on one line and exit with status 2, without a traceback. The
    message names the field or file, its value, and valid values.
    """


class MissingFiles(UserError):
    """Files of a model are missing on this machine; `plan` then uses SDXL's sizes."""
