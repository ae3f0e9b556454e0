"""Errors of users and their messages."""


class RTPurboError(Exception):
    """Error that a user can correct.

    The message is one sentence that names the problem and the remedy; the command line prints it without a
    traceback.
    """


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """Returns the first line of an error's message without a final full stop.

    Args:
        error: error of any type; its type replaces an empty message.
        with_type: prefix the message with the type.
    """
    name, message = type(error).__name__, str(error).strip()
    text = f"{name}: {message}" if with_type else message or name
    return text.splitlines()[0].rstrip(".")
