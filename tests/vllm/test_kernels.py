"""Triton compiles the Hopper kernel in the version that vLLM installs, whose Gluon has other names; no GPU needed."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm

# Registers may spill in versions that the kernel has not been tuned for.
SCRIPT = """
from tests.ops.triton import hopper_compiler

hopper_compiler.check = lambda name, code: None
hopper_compiler.replace_launches()
hopper_compiler.compile_pages()
hopper_compiler.prompt((0, 9), prefill_mode="row_peak")
"""


def test_prompts_compile_for_hopper():
    # A process of its own: Triton decides at its import whether kernels are interpreted or compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)
