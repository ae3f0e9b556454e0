"""Heavy hitters: tokens of a prompt that its last queries attend to most, kept in place of the last sinks.

A windowed KV head holds sinks and window only, so tokens of a prompt that its heads need while they answer are gone.
As in SnapKV (arXiv 2404.14469), the last queries of the prompt, which usually contain the question, choose the tokens
that each windowed KV head keeps. They are stored in the places of the last sinks, so decode steps do not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.attend import attend
from rtpurbo.ops.eager.visibility import causal_mask, near_mask, query_chunks
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import HeadGroup, KeyValueStates

# Last queries of a prompt that choose, and tokens on either side of a key that share its attention (SnapKV).
OBSERVED_QUERIES = 64
NEIGHBOURS = 3


def shortest_prompt(rule: AttentionRule) -> int:
    """Returns the length of the shortest prompt with heavy hitters: enough tokens are outside sinks and window."""
    return rule.sliding_window + rule.num_sink_tokens - 1


@torch.no_grad()
def heavy_hitters(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    rule: AttentionRule,
    *,
    scaling: float,
    num_tokens: int | None = None,
) -> Tensor:
    """Selects the tokens that replace the last sinks of each windowed KV head.

    Args:
        query_states: [batch, heads, q_len, head_dim], queries of a prompt, after RoPE; `heads` in the order of the
            KV heads, as many for each.
        query_positions: int64 [batch, q_len], -1 for padding.
        states: keys of the prompt, position -1 for those that are not there.
        rule: windows and number of heavy hitters.
        scaling: factor on the dot products.
        num_tokens: tokens of the prompt; None if the queries are its last ones.

    Returns:
        int64 [batch, num_key_value_heads, num_heavy_hitters], indices along k_len; -1 in sequences of which fewer
        tokens leave the window, all of which are sinks.
    """
    queries = query_states[:, :, -OBSERVED_QUERIES:]
    positions = query_positions[:, -OBSERVED_QUERIES:]
    batch, num_kv_heads, length, head_dim = states.keys.shape
    q_len, count = queries.shape[2], rule.num_heavy_hitters
    keys = states.keys.transpose(2, 3)
    sizes = batch, num_kv_heads, queries.shape[1] // num_kv_heads
    mass = queries.new_zeros(*sizes, length, dtype=torch.float32)
    for chunk in query_chunks(q_len, queries.shape[:2].numel() * length):
        rows = queries[:, :, chunk].reshape(batch, num_kv_heads, -1, head_dim)
        logits = (rows @ keys).float() * scaling
        logits = logits.view(*sizes, -1, length)
        hidden = ~causal_mask(positions[:, chunk], states.positions)[:, :, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
        mass += weights.sum(3)
    mass = mass.amax(2)
    mass = F.max_pool1d(mass, 2 * NEIGHBOURS + 1, stride=1, padding=NEIGHBOURS)

    end = query_positions.amax(1, keepdim=True) + 1 if num_tokens is None else num_tokens
    last_left = end - rule.sliding_window
    leaves = states.positions >= rule.num_fixed_sinks
    leaves &= states.positions <= last_left
    # Neighbours are equal: of these the first ones, whatever keys follow the prompt.
    order = mass.masked_fill(~leaves[:, None], -1.0).sort(dim=-1, descending=True, stable=True)
    chosen = order.indices[..., :count]
    slots = F.pad(chosen, (0, count - chosen.shape[-1]), value=-1)
    return slots.masked_fill((leaves.sum(1) < count)[:, None, None], -1)


def gather_tokens(states: Tensor, slots: Tensor) -> Tensor:
    """Returns the states [batch, heads, tokens, dim] in slots [batch, heads, tokens] of [batch, heads, k_len, dim]."""
    return states.gather(2, slots[..., None].expand(*slots.shape, states.shape[3]))


def attention_after_prompts(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    group: HeadGroup,
    spans: Sequence[tuple[int, int]],
    rule: AttentionRule,
    *,
    scaling: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Window attention of the queries that answer prompts, in one forward without a cache.

    `states` are those of the windowed KV heads, with a key for each query and for tokens before the first one, if any.
    `group` are the local heads, in the order of the KV heads and as many for each. `spans` are the first query and the
    end of each answer, ascending: all tokens before an answer are its prompt, and up to `OBSERVED_QUERIES` queries
    before it choose its heavy hitters. Other arguments are as in `AttentionCall`.

    Returns:
        [batch, heads of the group, queries of all spans, head_dim].
    """
    batch, num_kv_heads, length, head_dim = states.keys.shape
    query_states = query_states[:, group.heads]
    queries = torch.cat([query_states[:, :, begin:end] for begin, end in spans], 2)
    positions = torch.cat([query_positions[:, begin:end] for begin, end in spans], 1)
    num_sinks, kept = rule.num_sink_tokens, None
    if rule.num_heavy_hitters:
        begins = [begin for begin, _ in spans]
        each = _kept_tokens(query_states, query_positions, states, begins, rule, scaling)
        repeats = [end - begin for begin, end in spans]
        kept = torch.cat(
            [row.expand(-1, -1, n, -1) for row, n in zip(each.split(1, 2), repeats, strict=True)], 2
        )
        num_sinks = rule.num_fixed_sinks
    parts = []
    for chunk in query_chunks(queries.shape[2], queries.shape[:2].numel() * length):
        rows = positions[:, chunk]
        visible = near_mask(rows, states.positions, rule.sliding_window, num_sinks)
        if kept is not None:
            visible = visible | kept[:, :, chunk] & causal_mask(rows, states.positions)
        # The query heads of a KV head are further queries of it, so that keys are not repeated.
        grouped = queries[:, :, chunk].reshape(batch, num_kv_heads, -1, head_dim)
        visible = visible.repeat(1, 1, queries.shape[1] // num_kv_heads, 1)
        output, log_sum_exp = attend(
            grouped, states.keys, states.values, visible, scaling,
            return_log_sum_exp=sinks is not None,
        )  # fmt: skip
        shape = batch, queries.shape[1], rows.shape[1]
        output = output.reshape(*shape, -1)
        if sinks is not None:
            assert log_sum_exp is not None
            output, _ = with_sinks(output, log_sum_exp.reshape(shape), sinks[group.heads])
        parts.append(output)
    return torch.cat(parts, 2)


@torch.no_grad()
def _kept_tokens(
    query_states: Tensor, query_positions: Tensor, states: KeyValueStates, begins: Sequence[int],
    rule: AttentionRule, scaling: float,
) -> Tensor:  # fmt: skip
    """Mask of the tokens in the places of the last sinks: bool [batch, num_key_value_heads, prompts, k_len].

    They are the heavy hitters of each prompt, or these sinks themselves after a short prompt. A prompt ends where an
    answer begins.
    """
    # The last queries of each prompt, with padding before the first ones.
    start = max(0, begins[0] - OBSERVED_QUERIES)
    rows = slice(start, begins[-1])
    padded = F.pad(query_states[:, :, rows], (0, 0, OBSERVED_QUERIES, 0))
    padded_positions = F.pad(query_positions[:, rows], (OBSERVED_QUERIES, 0), value=-1)
    observed = [slice(begin - start, begin - start + OBSERVED_QUERIES) for begin in begins]
    # Prompts are sequences of a batch here.
    queries = torch.cat([padded[:, :, each] for each in observed])
    positions = torch.cat([padded_positions[:, each] for each in observed])
    keys, key_positions = (
        torch.cat([each] * len(begins)) for each in (states.keys, states.positions)
    )
    prompts = KeyValueStates(keys, keys, key_positions)  # values are not read
    slots = heavy_hitters(queries, positions, prompts, rule, scaling=scaling)
    # One column more, for slots that are not there.
    kept = slots.new_zeros(*slots.shape[:2], keys.shape[2] + 1, dtype=torch.bool)
    kept = kept.scatter(2, slots.masked_fill(slots < 0, keys.shape[2]), True)[..., :-1]
    is_late = key_positions >= rule.num_fixed_sinks
    late_sinks = (is_late & (key_positions < rule.num_sink_tokens))[:, None]
    kept = kept | late_sinks & (slots < 0).all(2, keepdim=True)
    return torch.stack(kept.chunk(len(begins)), 2)
