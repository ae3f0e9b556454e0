"""Unselected far keys as block means: the mean value of each block, weighted by the estimated mass.

Top-p drops up to 1 - p of a query's mass. Where attention is diffuse, as in counting, the answer depends on that
mass (docs/experiment-log.md). The index estimates the logit of every far key, selected or not, so the mass of the
unselected keys of a block is known without reading them; only their values are replaced, by the mean value of the
block. Of a block of 64 tokens, this reads one value instead of 64 keys and values.

Blocks have `block_size` positions and are aligned to position 0. The near window has at least one block, so that
every block with a far key lies before the query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rtpurbo.ops.eager.selection import block_ids, masses, sum_blocks
from rtpurbo.ops.states import KeyValueStates


class UnselectedMass(NamedTuple):
    """Estimated mass of the unselected far keys of each query.

    Attributes:
        shares: [batch, heads, q_len, num_blocks], share of each block; zeros for queries without
            unselected keys.
        log_sum_exp: [batch, heads, q_len], natural; minus infinity for queries without unselected keys.
    """

    shares: Tensor
    log_sum_exp: Tensor


def unselected_mass(
    estimate: Tensor, unselected: Tensor, key_positions: Tensor, block_size: int, num_blocks: int
) -> UnselectedMass:
    """Estimated mass of the unselected far keys by block.

    Args:
        estimate: index scores [batch, heads, q_len, k_len], in the units of logits.
        unselected: bool, the same shape: far keys that are not selected.
        key_positions: int64 [batch, k_len].
        block_size: positions in a block.
        num_blocks: blocks up to the last position.
    """
    logits = estimate.masked_fill(~unselected, -torch.inf)
    shares = sum_blocks(masses(logits), block_ids(key_positions, block_size), num_blocks)
    return UnselectedMass(shares, logits.logsumexp(-1))


def block_value_means(states: KeyValueStates, block_size: int, num_blocks: int) -> Tensor:
    """Mean value of the keys in each block: [batch, num_key_value_heads, num_blocks, head_dim].

    Args:
        states: values and positions, in any order.
        block_size: positions in a block.
        num_blocks: blocks up to the last position; zeros for empty ones.
    """
    values = states.values.to(torch.promote_types(states.values.dtype, torch.float32))
    # Padding and empty slots go to an extra block.
    ids = torch.where(states.positions < 0, num_blocks, states.positions // block_size)
    places = ids[:, None, :, None].expand(values.shape)
    sums = values.new_zeros(*values.shape[:2], num_blocks + 1, values.shape[-1])
    counts = values.new_zeros(values.shape[0], num_blocks + 1).scatter_add(
        1, ids, torch.ones_like(ids, dtype=values.dtype)
    )
    means = sums.scatter_add(2, places, values) / counts.clamp(min=1)[:, None, :, None]
    return means[:, :, :-1].to(states.values.dtype)


def add_block_means(
    output: Tensor, log_sum_exp: Tensor, mass: UnselectedMass, means: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds the unselected far keys to attention over near and selected keys.

    Args:
        output: [batch, heads, q_len, head_dim], attention over near and selected keys.
        log_sum_exp: [batch, heads, q_len], its natural log-sum-exp.
        mass: of the same heads.
        means: from `block_value_means`, expanded to the query heads.

    Returns:
        Output and log-sum-exp over all visible keys.
    """
    share = torch.sigmoid(mass.log_sum_exp - log_sum_exp)
    # No keys at all (padding): both are minus infinity.
    share = torch.where(mass.log_sum_exp == -torch.inf, 0.0, share)[..., None].to(output.dtype)
    replaced = mass.shares.to(means.dtype) @ means
    joined = output * (1 - share) + replaced * share
    return joined, torch.logaddexp(log_sum_exp, mass.log_sum_exp.to(log_sum_exp.dtype))
