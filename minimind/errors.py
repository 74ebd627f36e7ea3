"""The errors a user can cause or meet, each with its exit code (see docs: exit codes).

Every message names the place, the value and the next move. `cli.main` prints the message without a traceback and exits
with `exit_code`; everything else that is raised is a defect and keeps its traceback.
"""


class MinimindError(Exception):
    """Base of every error with an exit code of its own."""

    exit_code = 1


class ConfigError(MinimindError):
    """A bad configuration or usage: unknown key, impossible value, missing file named on the command line."""

    exit_code = 2


class DataError(MinimindError):
    """Bad training data: a malformed row (`file:line: what`), an empty file, a changed data set."""

    exit_code = 3


class CheckpointError(MinimindError):
    """A checkpoint that is missing, corrupt, or belongs to another model or tokenizer."""

    exit_code = 4


class DivergedError(MinimindError):
    """Training met a loss or gradient that is not finite; no weight was changed by it."""

    exit_code = 5


class OutOfResourcesError(MinimindError):
    """The disk or the memory is full; the message names the bytes needed."""

    exit_code = 6


class Preempted(MinimindError):  # noqa: N818 - an outcome, not a fault
    """SIGTERM arrived: the run was saved and can be resumed."""

    exit_code = 75


class Interrupted(MinimindError):  # noqa: N818 - an outcome, not a fault
    """SIGINT arrived: the run was saved and can be resumed."""

    exit_code = 130
