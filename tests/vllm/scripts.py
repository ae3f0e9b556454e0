"""Scripts that run engines in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = "RESULT "
"""Start of the line in which a script prints its result as JSON."""


def run(
    script: str, folder: Path, *arguments: str, timeout: float = 240, **environment: str
) -> str:
    """Runs a script with vLLM's engine in another process, unless told otherwise, and returns its output.

    Args:
        script: Python code.
        folder: folder to write it to.
        arguments: command line.
        timeout: seconds after which the test fails.
        environment: variables that are added.
    """
    path = folder / "script.py"
    path.write_text(script)
    variables = {
        **os.environ,
        # vLLM and rtpurbo's metadata may come from the variable too.
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        check=False,
        env=variables,
        cwd=ROOT,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout


def result_of(script: str, folder: Path, *request: Any, **environment: str) -> Any:
    """Runs a script that reads a JSON request from its command line, and returns the result that it prints."""
    printed = run(script, folder, json.dumps(request), **environment)
    results = [line for line in printed.splitlines() if line.startswith(RESULT)]
    assert results, printed[-5000:]
    return json.loads(results[0].removeprefix(RESULT))
