"""Rank of this process among those that `torchrun` started, from the environment; imports nothing heavy."""

import os


def started_by_torchrun() -> bool:
    """True if `torchrun` started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """True if this process writes files and messages; always true for a single process."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_process_of_its_machine() -> bool:
    """True if this process is the first of its machine, which reports errors of that machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
