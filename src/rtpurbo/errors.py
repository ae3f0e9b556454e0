"""The error that tells a user what went wrong."""


class RTPurboError(Exception):
    """A mistake of the user's that one sentence explains.

    The message names what is wrong and what to do about it; the command line prints it without a
    traceback.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message without its full stop, or the error's type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
