"""Errors and messages of the commands."""

import sys

MISTAKES = (OSError, ValueError, NotImplementedError, ImportError)
"""What a command raises for errors of the user, with a message for them."""


class CommandError(Exception):
    """User error; its message is printed without a traceback."""


def tell(message: object) -> None:
    """Print a message for the user to stderr."""
    print(message, file=sys.stderr, flush=True)
