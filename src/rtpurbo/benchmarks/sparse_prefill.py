"""A layer's sparse prefill with lists of our choice: all of the work, and the density that is wanted.

It is what `rtpurbo.ops.triton.headwise` does, scoring included, but reads the blocks of lists made
beforehand: the index of random numbers finds nothing, and would tell nothing about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from rtpurbo.benchmarks.lists import density_of, synthetic_lists
from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from rtpurbo.ops.triton.headwise import prefill_attention
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring import block_lists


class SparsePrefill:
    """Sparse prefill of one layer, to be run again and again.

    Args:
        layout: the layer's heads.
        rule: windows, sizes and how often the index is asked.
        lists: what to read, by the first row; None reads what the index finds.
    """

    def __init__(
        self,
        layout: HeadLayout,
        rule: AttentionRule,
        lists: Mapping[int, BlockLists] | None = None,
    ) -> None:
        self.layout = layout
        self.rule = rule
        self.lists = lists

    def __call__(
        self,
        queries: Tensor,
        full: KeyValueStates,
        windowed: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> Tensor:
        """Output [batch, num_attention_heads, q_len, head_dim]; arguments as the operator's."""

        def choose(*asked: Any) -> Iterator[tuple[int, BlockLists]]:
            for row, found in block_lists(*asked):
                yield row, found if self.lists is None else self.lists[row]

        return self._attend(choose, queries, full, windowed, index_queries, scaling)

    def found_lists(
        self,
        queries: Tensor,
        full: KeyValueStates,
        windowed: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> Iterator[tuple[int, BlockLists]]:
        """The lists that the index finds, for some thousands of rows each."""
        found: list[tuple[int, BlockLists]] = []

        def keep(*asked: Any) -> Iterator[tuple[int, BlockLists]]:
            found.extend(block_lists(*asked))
            return iter(())

        self._attend(keep, queries, full, windowed, index_queries, scaling)
        return iter(found)

    def force(
        self,
        density: float,
        queries: Tensor,
        full: KeyValueStates,
        windowed: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> float:
        """Makes the lists to read from now on; returns the density that they have."""
        arguments = queries, full, windowed, index_queries, scaling
        chunks = [(row, found.blocks.shape[2]) for row, found in self.found_lists(*arguments)]
        length, heads = queries.shape[2], len(self.layout.retrieval)
        self.lists = synthetic_lists(chunks, length, self.rule, heads, density, queries.device)
        return density_of(self.lists, length, self.rule)

    def _attend(
        self,
        make_lists: Callable[..., Iterator[tuple[int, BlockLists]]],
        queries: Tensor,
        full: KeyValueStates,
        windowed: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> Tensor:
        output, _ = prefill_attention(
            queries,
            full,
            windowed,
            self.layout,
            index_queries,
            self.rule,
            scaling=scaling,
            make_lists=make_lists,
        )
        return output
