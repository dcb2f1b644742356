"""The one exception that users are meant to read, and how a command ends on it."""

import contextlib
import sys


class D2SSLError(ValueError):
    """Bad input: one line that names the thing and the fix."""


class Diverged(D2SSLError):
    """The loss became infinite or NaN: the same run would do so again."""


@contextlib.contextmanager
def exit_on_error():
    """Inside a command: a :class:`D2SSLError` becomes one line on stderr and exit code 2."""
    try:
        yield
    except D2SSLError as error:
        # From a data-loading worker it arrives wrapped in the worker's traceback.
        message = str(error).rsplit("D2SSLError: ", 1)[-1].strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
