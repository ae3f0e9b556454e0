"""Decoding steps as tests run them: memory that is not in use is poisoned, results come to the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates
from rtpurbo.ops.eager.attend import attend
from rtpurbo.ops.states import PagedStates
from rtpurbo.ops.triton.decode.attention import decode_step
from rtpurbo.ops.triton.decode.workspace import Selection
from tests import oracles
from tests.ops.triton.support import DEVICE, EPSILON


def poisoned(states: Tensor | None, real: Tensor, spare: int) -> Tensor | None:
    """States [batch, heads, slots, dim] with NaN where no token is, and `spare` slots more of it."""
    if states is None:
        return None
    batch, heads, slots, dim = states.shape
    wider = states.new_full((batch, heads, slots + spare, dim), torch.nan)
    wider[:, :, :slots] = states.masked_fill(~real[:, None, :, None], torch.nan)
    return wider.to(DEVICE)


def cached(states: KeyValueStates, padding: Sequence[int], spare: int) -> KeyValueStates:
    """States as a cache hands them over that has room for `spare` tokens more."""
    real = states.positions >= 0
    return KeyValueStates(
        poisoned(states.keys, real, spare),
        poisoned(states.values, real, spare),
        states.positions.to(DEVICE),
        poisoned(states.index_keys, real, spare),
        in_order=not any(padding),
        first_slots=torch.tensor(padding, dtype=torch.int32, device=DEVICE)
        if any(padding)
        else None,
        length=torch.tensor([real.shape[1]], dtype=torch.int32, device=DEVICE) if spare else None,
    )


def ring(states: KeyValueStates, rule: AttentionRule, slack: int = 5) -> KeyValueStates:
    """The same keys as a ring holds them: sinks first, then the latest, each where it falls."""
    batch, heads, _, dim = states.keys.shape
    sinks, size = rule.num_sink_tokens, rule.sliding_window + slack
    keys = states.keys.new_full((batch, heads, sinks + size, dim), torch.nan)
    values, slot_positions = keys.clone(), states.positions.new_full((batch, sinks + size), -1)
    for row, positions in enumerate(states.positions.tolist()):
        latest = max(positions)
        for place, position in enumerate(positions):
            if 0 <= position < sinks or position > max(-1, latest - size):
                slot = position if position < sinks else sinks + (position - sinks) % size
                keys[row, :, slot] = states.keys[row, :, place]
                values[row, :, slot] = states.values[row, :, place]
                slot_positions[row, slot] = position
    return KeyValueStates(keys.to(DEVICE), values.to(DEVICE), slot_positions.to(DEVICE))


def paged(full: KeyValueStates, padding: Sequence[int], page_size: int) -> PagedStates:
    """The keys of `cached` states in pages, in an order of no meaning; other rows are poison."""
    batch, _, capacity, _ = full.keys.shape
    max_pages = -(-capacity // page_size)
    lengths = [capacity - pad for pad in padding]
    order = torch.randperm(batch * max_pages, generator=torch.Generator().manual_seed(0)) + 1
    table = order.view(batch, max_pages).to(torch.int32)

    def pages(states: Tensor) -> Tensor:
        shape = (batch * max_pages + 1, states.shape[1], page_size, states.shape[3])
        filled = states.new_full(shape, torch.nan)
        for row, length in enumerate(lengths):
            for position in range(length):
                page = int(table[row, position // page_size])
                filled[page, :, position % page_size] = states[row, :, padding[row] + position]
        return filled

    for row, length in enumerate(lengths):
        table[row, -(-length // page_size) :] = 2**30
    table = torch.nn.functional.pad(table, (0, 3))[:, :max_pages]  # rows need not follow each other
    return PagedStates(
        pages(full.keys),
        pages(full.values),
        table.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        None if full.index_keys is None else pages(full.index_keys),
    )


def assert_nearly_as_exact_as_eager(
    problem: oracles.Problem, mask: Tensor, output: Tensor, log_sum_exp: Tensor
) -> None:
    """The error against fp64 is at most twice eager's, and what fp32 exponents lose."""
    kv_head_index = problem.kv_head_index
    keys, values = problem.keys[:, kv_head_index], problem.values[:, kv_head_index]
    plain = attend(problem.queries, keys, values, mask, problem.scaling, True)
    expected = oracles.attend(problem, mask)
    exponents = 2**-24 * oracles.exact_logits(problem).abs().max()
    for actual, reference, exact in zip((output, log_sum_exp), plain, expected, strict=True):
        blind = exact.isinf()
        assert torch.equal(blind, actual.isinf())
        error, allowed = (
            (part.double() - exact).masked_fill(blind, 0).abs().max()
            for part in (actual, reference)
        )
        size = exact.masked_fill(blind, 0).abs().max()
        assert error <= 2 * allowed + (2 * EPSILON[output.dtype] + exponents) * size


@dataclass
class Step:
    """A decode step: what it was asked, on the CPU, and how to ask the kernels."""

    problem: oracles.Problem
    layout: HeadLayout
    arguments: list
    rule: AttentionRule
    padding: Sequence[int]

    @classmethod
    def build(
        cls,
        k_len: int,
        rule: AttentionRule,
        retrieval_heads: Sequence[int] = (1, 2),
        *,
        dtype: torch.dtype,
        padding: Sequence[int] = (0,),
        spare: int = 0,
        in_ring: bool = False,
        **options: int,
    ) -> Step:
        """The last token of sequences of `k_len`; options are those of `random_problem`."""
        options = {"head_dim": 16, "index_dim": 8, **options}
        problem = oracles.random_problem(1, k_len, padding=padding, **options).to(dtype)
        heads, key_value_heads = problem.queries.shape[1], problem.keys.shape[1]
        layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
        queries, _, full, windowed, _, index_queries = problem.layered(layout, 1)
        arguments = [
            queries.to(DEVICE),
            cached(full, padding, spare),
            ring(windowed, rule) if in_ring else cached(windowed, padding, 0),
            HeadLayout.build(retrieval_heads, heads, key_value_heads, DEVICE),
            index_queries.to(DEVICE),
        ]
        return cls(problem, layout, arguments, rule, padding)

    def run(self, **options) -> tuple[Tensor, Tensor | None, Selection | None]:
        """Output, log-sum-exp and selection of the kernels."""
        return decode_step(*self.arguments, self.rule, self.problem.scaling, **options)

    def far(self) -> Tensor:
        """Keys that retrieval heads may select, by slot: bool [batch, heads, 1, k_len]."""
        near = oracles.near_keys(self.problem, self.rule.near_window, self.rule.num_sink_tokens)
        return oracles.visible_keys(self.problem) & ~near

    def selected(self, selection: Selection | None) -> Tensor:
        """Far keys that a selection lets through, by slot: bool [batch, retrieval heads, 1, k_len]."""
        far = self.far()[:, self.layout.retrieval.heads]
        if selection is None:
            return far
        k_len = far.shape[-1]
        by_position = selection.keys(k_len).cpu()
        slots = self.problem.key_positions.clamp(min=0)[:, None].expand_as(by_position)
        return by_position.gather(2, slots)[:, :, None] & far

    def seen(self, selection: Selection | None) -> Tensor:
        """Keys that each head reads: bool [batch, heads, 1, k_len]."""
        mask = oracles.near_keys(self.problem, self.rule.sliding_window, self.rule.num_sink_tokens)
        mask = mask.clone()
        if len(self.layout.retrieval):
            heads = self.layout.retrieval.heads
            near = oracles.near_keys(self.problem, self.rule.near_window, self.rule.num_sink_tokens)
            mask[:, heads] = near[:, heads] | self.selected(selection)
        return mask

    def check(self, **options) -> Tensor:
        """Runs the kernels and compares with attention over what they selected, which is returned."""
        output, log_sum_exp, selection = self.run(return_log_sum_exp=True, **options)
        mask = self.seen(selection)
        assert output.dtype == self.problem.queries.dtype
        assert_nearly_as_exact_as_eager(self.problem, mask, output.cpu(), log_sum_exp.cpu())
        return mask

    def replaced(self, **changes) -> Step:
        """The same step under another rule, or with other arguments."""
        return replace(self, **changes)
