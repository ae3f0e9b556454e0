"""The error that tells a user what went wrong."""


class RTPurboError(Exception):
    """A mistake of the user's that one sentence explains.

    The message names what is wrong and what to do about it; the command line prints it without a
    traceback.
    """
