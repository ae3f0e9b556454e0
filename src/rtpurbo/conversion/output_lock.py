"""Lock of an output folder, so that two jobs do not write to it at the same time."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from rtpurbo.errors import RTPurboError


class OutputLock:
    """Lock of an output folder on this machine; released when the process ends.

    Args:
        folder: output folder; its parent must exist when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder.absolute()
        self._path = path.with_name(f".{path.name}.lock")
        self._lock = FileLock(self._path, timeout=0)

    def acquire(self) -> None:
        """Acquires the lock.

        Raises:
            RTPurboError: another job holds it, or the lock file cannot be created.
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
        """Releases the lock, if it is held."""
        if self._lock.is_locked:
            self._path.unlink(missing_ok=True)
            self._lock.release()
