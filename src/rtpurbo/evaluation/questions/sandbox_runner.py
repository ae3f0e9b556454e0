"""Runs the program on standard input under limits; a script of its own, see `sandbox`.

Usage: python -I sandbox_runner.py SECONDS MEMORY_BYTES. The first line of the input is printed
after the program has run to its end.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_REFUSED = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "os.spawn", "os.startfile", "os.kill", "pty.", "ftplib.", "smtplib.", "urllib.", "signal.pthread",
)  # fmt: skip
_CHANGES_FILES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "shutil.",
)  # fmt: skip


def _limit(seconds: float, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 2**24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def _leave_network() -> None:
    """Enters a network namespace without interfaces, where the kernel permits it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _refuse(folder: str) -> None:
    """Installs an audit hook, which cannot be removed."""
    # Closure variables: the program can change the globals of this module.
    real, absolute, fspath = os.path.realpath, os.path.isabs, os.fspath
    allowed, refused, changes = (folder, folder + os.sep), _REFUSED, _CHANGES_FILES
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(fspath(path))
        place = real(text if absolute(text) else folder + os.sep + text)
        return place == allowed[0] or place.startswith(allowed[1])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is refused here")
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & writing and not inside(path):
                raise PermissionError("writing outside of the temporary folder is refused here")
        elif event.startswith(changes):
            paths = [item for item in arguments if isinstance(item, str | bytes | os.PathLike)]
            if not all(map(inside, paths)):
                raise PermissionError(f"{event} outside of the temporary folder is refused here")

    sys.addaudithook(hook)


def main() -> None:
    """Reads the program, sets the limits, runs the program and prints the marker."""
    marker, _, program = sys.stdin.buffer.read().partition(b"\n")
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _leave_network()
    _limit(float(sys.argv[1]), int(sys.argv[2]))
    write = os.write
    _refuse(str(Path.cwd().resolve()))
    exec(compile(program, "<generated>", "exec"), {"__name__": "__main__"})
    write(report, marker)


if __name__ == "__main__":
    main()
