"""The exceptions that stand for a mistake of the user rather than of the program."""


class UserError(Exception):
    """A mistake that the user can mend: a wrong field, a missing file, a corrupt record.

    Commands print its message on one line and exit with status 2, without a traceback. The
    message names the field or file, its value, and what would be right.
    """


class MissingFiles(UserError):
    """Files of a model are not on this machine; `plan`, which needs none, then takes SDXL's sizes."""
