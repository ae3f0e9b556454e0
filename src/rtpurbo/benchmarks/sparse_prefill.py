"""A layer's sparse prefill with lists of our choice: all of the work, and the density that is wanted.

It does what `rtpurbo.ops.triton.headwise` does, scoring included, but reads the blocks of lists made
beforehand: the index of random numbers finds nothing, and would tell nothing about speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks.lists import density_of, synthetic_lists
from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from rtpurbo.ops.triton.heads import HeadTable, query_starts
from rtpurbo.ops.triton.headwise import listed_attention
from rtpurbo.ops.triton.prefill import hopper, portable
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
        self._near = HeadTable.build(layout.retrieval, rule.near_window)
        self._full = self._near.followed_by(HeadTable.build(layout.local_full, rule.sliding_window))
        self._bounded = HeadTable.build(layout.local_bounded, rule.sliding_window)

    def __call__(
        self,
        queries: Tensor,
        full: KeyValueStates,
        bounded: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> Tensor:
        """Output [batch, num_attention_heads, q_len, head_dim]; arguments as the operator's."""
        output, log_sum_exp, starts = self._near_keys(queries, full, bounded, scaling)
        for row, found in self._found(index_queries, full, starts, log_sum_exp):
            listed_attention(
                queries,
                full,
                self._near,
                starts,
                found if self.lists is None else self.lists[row],
                row,
                self.rule,
                scaling,
                output,
                log_sum_exp,
            )
        return output

    def found_lists(
        self,
        queries: Tensor,
        full: KeyValueStates,
        bounded: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> Iterator[tuple[int, BlockLists]]:
        """The lists that the index finds, some rows at a time."""
        _, log_sum_exp, starts = self._near_keys(queries, full, bounded, scaling)
        yield from self._found(index_queries, full, starts, log_sum_exp)

    def force(
        self,
        density: float,
        queries: Tensor,
        full: KeyValueStates,
        bounded: KeyValueStates,
        index_queries: Tensor,
        scaling: float,
    ) -> float:
        """Makes the lists to read from now on; returns the density that they have."""
        arguments = queries, full, bounded, index_queries, scaling
        chunks = [(row, found.blocks.shape[2]) for row, found in self.found_lists(*arguments)]
        length, heads = queries.shape[2], len(self.layout.retrieval)
        self.lists = synthetic_lists(chunks, length, self.rule, heads, density, queries.device)
        return density_of(self.lists, length, self.rule)

    def _near_keys(
        self, queries: Tensor, full: KeyValueStates, bounded: KeyValueStates, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, q_len, head_dim = queries.shape
        output = queries.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
        log_sum_exp = queries.new_empty(batch, heads, q_len, dtype=torch.float32)
        starts = query_starts(full, q_len)
        groups = [(full, self._full), (bounded, self._bounded)]
        kernels: Any = hopper if hopper.suits(queries) else portable
        kernels.window_attention(
            queries,
            [(states, table) for states, table in groups if len(table)],
            starts,
            self.rule.num_sink_tokens,
            scaling,
            output,
            log_sum_exp,
        )
        return output, log_sum_exp, starts

    def _found(
        self, index_queries: Tensor, full: KeyValueStates, starts: Tensor, log_sum_exp: Tensor
    ) -> Iterator[tuple[int, BlockLists]]:
        return block_lists(index_queries, full, self._near, starts, log_sum_exp, self.rule)
