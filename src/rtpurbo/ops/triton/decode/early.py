"""Launches that begin before the one that they depend on has ended, so that its last programs hide their start.

This is what NVIDIA calls a programmatic dependent launch: a kernel lets the next one begin as soon as all
of its own programs run, and each program of the next waits, before it reads what was written, until
everything has been. A step of short launches that depend on each other is made of such starts.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The first compute capability whose launches may overlap.
HOPPER = (9, 0)


@cache
def can_begin_early(device: torch.device) -> bool:
    """Whether launches on this device may begin before those that they depend on have ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= HOPPER


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """The next launch may begin once every program of this one has come here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Goes on when all that earlier launches write is written. No program may read or write before."""
    if EARLY:
        gdc_wait()
