"""Which of the processes that `torchrun` started this is, by its environment; imports nothing heavy."""

import os


def started_by_torchrun() -> bool:
    """Whether this process is one of several, by its environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process writes and talks, by its environment; true for a process alone."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_process_of_its_machine() -> bool:
    """Whether this process tells of errors, which a machine may have to itself; by its environment."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
