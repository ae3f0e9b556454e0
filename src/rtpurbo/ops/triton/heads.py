"""Tables of the query heads of a launch, as kernel arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.ops.states import HeadGroup

# A window longer than any context.
EVERYTHING = 2**30

MAX_HEAD_DIM = 256
"""Largest head_dim that the kernels support."""


def supports_head_dim(head_dim: int, dtype: torch.dtype) -> bool:
    """Returns True if the kernels support a head_dim, which must be a multiple of 16 bytes."""
    return head_dim <= MAX_HEAD_DIM and head_dim * dtype.itemsize % 16 == 0


@dataclass(frozen=True)
class HeadTable:
    """Query heads of one launch.

    Attributes:
        heads: int32 [num_heads], query heads of the layer.
        key_value_heads: int32 [num_heads], KV head index of each within its states.
        windows: int32 [num_heads], keys of the window, including the query's own.
        num_dense: number of dense heads, which come first.
    """

    heads: Tensor
    key_value_heads: Tensor
    windows: Tensor
    num_dense: int = 0

    def __len__(self) -> int:
        return self.heads.numel()

    @classmethod
    def build(cls, group: HeadGroup, sliding_window: int | Tensor) -> HeadTable:
        """Table of a group of heads with one window, or with windows int [num_heads]."""
        if isinstance(sliding_window, Tensor):
            windows = sliding_window.to(torch.int32)
            num_dense = 0
        else:
            windows = torch.full_like(group.heads, sliding_window, dtype=torch.int32)
            num_dense = len(windows) if sliding_window == EVERYTHING else 0
        key_value_heads = group.key_value_heads.to(torch.int32)
        return cls(group.heads.to(torch.int32), key_value_heads, windows, num_dense)

    def followed_by(self, other: HeadTable) -> HeadTable:
        """Heads of this table, followed by those of another one without dense heads."""
        return HeadTable(
            torch.cat([self.heads, other.heads]),
            torch.cat([self.key_value_heads, other.key_value_heads]),
            torch.cat([self.windows, other.windows]),
            self.num_dense,
        )
