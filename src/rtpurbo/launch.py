"""Rank of this process among those that `torchrun` started, from the environment; without heavy imports."""

import os


def started_by_torchrun() -> bool:
    """Returns True if `torchrun` started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Returns True if this process writes files and messages; always true for a single process."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_process_of_its_machine() -> bool:
    """Returns True if this process is the first of its machine, which reports the machine's errors."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
