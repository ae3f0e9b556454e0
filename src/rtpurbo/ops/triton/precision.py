"""Precision of the matrix products in attention kernels."""

from __future__ import annotations

import triton.language as tl

IEEE = tl.constexpr("ieee")
"""`input_precision` of every product in attention and index scores: without it, Triton multiplies float32 inputs
as TF32 on a GPU. It does not affect half precision."""
