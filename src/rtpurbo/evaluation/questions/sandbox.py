"""Execution of untrusted generated code in a limited process.

The process has limits of CPU time, wall-clock time, memory, file size and open files, an empty
environment, an empty temporary folder, no standard input, and its own process group, which is
killed at the end. Network namespaces cut it off where the kernel permits them; an audit hook
refuses sockets, new processes, `ctypes` and writing outside the temporary folder everywhere. This
contains what a model writes by accident. It is no defence against code that attacks the
interpreter or the kernel: such code runs with the rights of the user, who may want a container.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SECONDS = 10.0
MEMORY_BYTES = 2 * 2**30

_RUNNER = Path(__file__).with_name("sandbox_runner.py")


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Returns True if a Python program ends without an error within its limits.

    They are those of CPU time, with wall-clock time up to 1.5 times as long, and of the address space.
    """
    # A program that exits early has status 0 too, but cannot print the marker.
    marker = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER), str(seconds), str(MEMORY_BYTES)],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process,
    ):
        try:
            output, _ = process.communicate(
                f"{marker}\n{program}".encode("utf-8", "replace"), timeout=1.5 * seconds
            )
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            # Processes that the program left behind belong to its group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return output.endswith(marker.encode())
