"""Runs a script in two processes that `torchrun` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

_END = """
import os, sys
from rtpurbo.processes import shutdown_distributed
shutdown_distributed()
# Threads of PyTorch sometimes abort an interpreter that comes down; the work is done by now.
sys.stdout.flush()
os._exit(0)
"""


def run_in_two_processes(script: str, folder: Path, *arguments: str | Path) -> str:
    """Runs a script in two processes on the CPU and returns what they printed.

    Args:
        script: Python source.
        folder: where the script is written.
        arguments: of its command line.
    """
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    path = folder / "worker.py"
    path.write_text(script + _END)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(path)]
    finished = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout
