"""What the interpreter runs, the compiler takes too; a GPU is not needed to ask it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia")


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    # A process of its own: kernels are interpreted or compiled as Triton was told at its import.
    subprocess.run(
        [sys.executable, "-m", "tests.ops.triton.hopper_compiler"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=True,
    )
