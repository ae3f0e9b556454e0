"""The error that tells a user what went wrong."""


class RTPurboError(Exception):
    """A mistake of the user's that one sentence explains.

    The message names what is wrong and what to do about it; the command line prints it without a
    traceback.
    """


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """Returns the first line of an error's message without a final full stop.

    Args:
        error: an error of any type; its type replaces an empty message.
        with_type: begin with the type.
    """
    name, message = type(error).__name__, str(error).strip()
    text = f"{name}: {message}" if with_type else message or name
    return text.splitlines()[0].rstrip(".")
