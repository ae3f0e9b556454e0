"""Programmatic dependent launch (PDL): a kernel starts before the one that it depends on has finished.

A kernel allows the next launch as soon as all of its own programs are running; each program of the next one
waits for the writes of the earlier kernel before it reads them. A decode step is a chain of short dependent
kernels, whose launch latencies overlap this way. PDL needs compute capability 9.0 (Hopper).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MIN_CAPABILITY = (9, 0)


@cache
def supports_pdl(device: torch.device) -> bool:
    """Returns True if kernels on this device may use programmatic dependent launch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch that reads the writes of the launch before it."""
    enabled = supports_pdl(device)
    # Triton's interpreter rejects `launch_pdl`, so the option is left out where it is off.
    return {"PDL": enabled, **({"launch_pdl": True} if enabled else {})}


@triton.jit
def allow_dependent_launch(PDL: tl.constexpr):
    """Lets the next kernel start once every program of this one has called this function."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_dependencies(PDL: tl.constexpr):
    """Waits until all writes of earlier kernels are visible; no program may access their memory before."""
    if PDL:
        gdc_wait()
