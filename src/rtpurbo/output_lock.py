"""A lock on an output folder: two jobs at once would mix their files."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from rtpurbo.errors import RTPurboError


class OutputLock:
    """Held by the one job of a machine that makes an output folder; it ends with the process.

    Args:
        folder: that the job makes; its parent must exist when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder.absolute()
        self._path = path.with_name(f".{path.name}.lock")
        self._lock = FileLock(self._path, timeout=0)

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            RTPurboError: another job has it, or the lock's file cannot be made.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RTPurboError(
                f"another job is writing {self._folder} at the moment: wait until it has ended, or "
                "choose another output folder."
            ) from error
        except OSError as error:
            raise RTPurboError(
                f"cannot lock {self._folder} ({error.strerror}): choose another output folder."
            ) from error

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._lock.is_locked:
            self._path.unlink(missing_ok=True)
            self._lock.release()
