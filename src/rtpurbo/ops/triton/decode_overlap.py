"""Launches that overlap: a launch starts while the one before it runs out, and waits for its results.

Hopper's programmatic dependent launch. Each launch lets the next start at once and waits, before it
touches memory, until the one before it has ended; that one waited likewise, so all before it have.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda

# Whether the launches of a step overlap, on GPUs that can (compute capability 9.0).
OVERLAP_LAUNCHES = False


def launch_options() -> dict[str, Any]:
    """What a launch that waits is given beside its arguments."""
    return {"launch_pdl": True} if OVERLAP_LAUNCHES else {}


@triton.jit
def start_next_launch(OVERLAP: tl.constexpr):
    """Lets the next launch start, which waits."""
    if OVERLAP:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last_launch(OVERLAP: tl.constexpr):
    """Returns when all that earlier launches wrote can be read."""
    if OVERLAP:
        cuda.gdc_wait()
