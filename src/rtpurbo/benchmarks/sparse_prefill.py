"""Sparse prefill of a layer with given block lists, to measure a given density.

Runs the same kernels as `rtpurbo.ops.triton.headwise`, scoring included, but reads the blocks of precomputed lists:
the density that a random index selects says nothing about that of a trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from rtpurbo.benchmarks.lists import density_of, synthetic_lists
from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import AttentionCall, HeadLayout
from rtpurbo.ops.triton.headwise import prefill_attention
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring import block_lists


class SparsePrefill:
    """Sparse prefill of one layer, with the block lists of the index until `force` replaces them.

    Args:
        layout: heads of the layer.
        rule: windows, block sizes and the stride of scored queries.
    """

    def __init__(self, layout: HeadLayout, rule: AttentionRule) -> None:
        self.layout, self.rule = layout, rule
        self.lists: Mapping[int, BlockLists] | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """Returns the output [batch, num_attention_heads, q_len, head_dim]."""

        def choose(*scored: Any) -> Iterator[tuple[int, BlockLists]]:
            for first_query, found in block_lists(*scored):
                yield first_query, found if self.lists is None else self.lists[first_query]

        return self._attend(choose, *arguments)

    def found_lists(self, *arguments: Any) -> dict[int, BlockLists]:
        """Returns the block lists of the index by their first query, each for some thousands of queries."""
        found: dict[int, BlockLists] = {}

        def keep(*scored: Any) -> Iterator[tuple[int, BlockLists]]:
            found.update(block_lists(*scored))
            return iter(())

        self._attend(keep, *arguments)
        return found

    def force(self, density: float, *arguments: Any) -> float:
        """Computes lists of about `density` for later calls, and returns their density."""
        queries = arguments[0]
        found = self.found_lists(*arguments)
        chunks = [(first_query, lists.blocks.shape[2]) for first_query, lists in found.items()]
        length, heads = queries.shape[2], len(self.layout.retrieval)
        self.lists = synthetic_lists(chunks, length, self.rule, heads, density, queries.device)
        return density_of(self.lists, length, self.rule)

    def _attend(
        self, make_lists: Callable[..., Iterator[tuple[int, BlockLists]]], *arguments: Any
    ) -> Tensor:
        queries, full, windowed, index_queries, scaling = arguments
        call = AttentionCall(
            queries, full.positions, full, windowed, self.layout, index_queries, self.rule, scaling
        )
        return prefill_attention(call, make_lists)[0]
