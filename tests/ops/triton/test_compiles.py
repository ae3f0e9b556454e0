"""The compiler accepts all kernels; it needs no GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia")


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    # A process of its own: Triton decides at its import whether kernels are interpreted or compiled.
    subprocess.run(
        [sys.executable, "-m", "tests.ops.triton.hopper_compiler"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=True,
    )
