"""Heavy hitters: tokens of a prompt that its last queries attend to most, kept in place of the last sinks.

A windowed KV head holds sinks and window only, so tokens of a prompt that its heads need while they answer are gone.
As in SnapKV (arXiv 2404.14469), the last queries of the prompt, which usually contain the question, choose the tokens
that each windowed KV head keeps. They are stored in the places of the last sinks, so decode steps do not change.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.local import local_attention
from rtpurbo.ops.eager.visibility import causal_mask, query_chunks
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
    chosen = mass.masked_fill(~leaves[:, None], -1.0).topk(min(count, length), -1)
    slots = F.pad(chosen.indices, (0, count - chosen.indices.shape[-1]), value=-1)
    return slots.masked_fill((leaves.sum(1) < count)[:, None, None], -1)


def gather_tokens(states: Tensor, slots: Tensor) -> Tensor:
    """Returns the states [batch, heads, tokens, dim] in slots [batch, heads, tokens] of [batch, heads, k_len, dim]."""
    return states.gather(2, slots[..., None].expand(*slots.shape, states.shape[3]))


def with_heavy_hitters(
    states: KeyValueStates, slots: Tensor, rule: AttentionRule
) -> KeyValueStates:
    """Returns states whose last sinks are replaced by the tokens in `slots`, from `heavy_hitters`."""
    batch, heads, length = states.keys.shape[:3]
    places = states.positions - rule.num_fixed_sinks
    is_place = (places >= 0) & (places < rule.num_heavy_hitters)
    places = places.clamp(0, rule.num_heavy_hitters - 1)[:, None].expand(batch, heads, length)
    chosen = slots.gather(2, places)
    own = torch.arange(length, device=chosen.device).expand_as(chosen)
    source = torch.where(is_place[:, None] & (chosen >= 0), chosen, own)
    return replace(
        states,
        keys=gather_tokens(states.keys, source),
        values=gather_tokens(states.values, source),
    )


def attention_after_prompt(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    group: HeadGroup,
    queries: slice,
    rule: AttentionRule,
    *,
    scaling: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Window attention of the queries that answer a prompt, in one forward without a cache.

    Arguments are as in `AttentionCall`; `states` are those of the windowed KV heads, with a key for each query and for
    tokens before the first one, if any. `group` are the local heads, and `queries` those after the prompt, which is all
    tokens before them, `OBSERVED_QUERIES` of which have a query.

    Returns:
        [batch, heads of the group, queries, head_dim].
    """
    prompt = slice(0, queries.start)
    # Tokens before the first query.
    before = states.keys.shape[2] - query_states.shape[2]
    query_states = query_states[:, group.heads]
    read = states.tokens(slice(0, before + queries.stop))
    if rule.num_heavy_hitters:
        slots = heavy_hitters(
            query_states[:, :, prompt], query_positions[:, prompt],
            states.tokens(slice(0, before + queries.start)), rule, scaling=scaling,
        )  # fmt: skip
        read = with_heavy_hitters(read, slots, rule)
    # The log-sum-exp selects explicit logits, whose gradients are finite; cuDNN's were not (docs/experiment-log.md).
    output, log_sum_exp = local_attention(
        query_states[:, :, queries],
        query_positions[:, queries],
        read,
        group.key_value_heads,
        sliding_window=rule.sliding_window,
        num_sink_tokens=rule.num_sink_tokens,
        scaling=scaling,
        return_log_sum_exp=True,
    )
    if sinks is not None:
        assert log_sum_exp is not None
        output, _ = with_sinks(output, log_sum_exp, sinks[group.heads])
    return output
