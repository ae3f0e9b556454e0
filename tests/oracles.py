"""Attention by definition: fp64, an explicit mask, loops that share no code with the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates
from rtpurbo.ops.eager.heavy_hitters import gather_tokens


@dataclass
class Problem:
    """Random inputs of one layer; index keys are one a query head, as if every head retrieved.

    With `shared_index`, the query heads of a KV head have equal ones, and states hold one for each KV head.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    index_queries: Tensor
    index_keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    scaling: float
    shared_index: bool = False

    @property
    def kv_head_index(self) -> Tensor:
        """The KV head of each query head."""
        heads, key_value_heads = self.queries.shape[1], self.keys.shape[1]
        return torch.arange(heads) // (heads // key_value_heads)

    def states(
        self, key_value_heads: Tensor | None = None, index_heads: Tensor | None = None
    ) -> KeyValueStates:
        """Arguments of the operators, of these KV heads and with index keys of these query heads."""
        kept = slice(None) if key_value_heads is None else key_value_heads
        indexed = slice(None) if index_heads is None else index_heads
        if self.shared_index:
            indexed = torch.arange(self.keys.shape[1], device=self.keys.device)[kept] * int(
                (self.kv_head_index == 0).sum()
            )
        return KeyValueStates(
            self.keys[:, kept],
            self.values[:, kept],
            self.key_positions,
            self.index_keys[:, indexed],
        )

    def layered(self, layout: HeadLayout, num_selecting: int) -> tuple:
        """The leading arguments of `headwise_attention`; the last rows select."""
        index_queries = self.index_queries[:, layout.retrieval.heads, -num_selecting:]
        return (
            self.queries,
            self.query_positions,
            self.states(layout.full_key_value_heads, layout.retrieval.heads),
            self.states(layout.windowed_key_value_heads),
            layout,
            index_queries if num_selecting else None,
        )

    def rows(self, batch_rows: Sequence[int]) -> Problem:
        """The same problem with its sequences in another order, or some of them."""
        chosen = torch.tensor(batch_rows)
        return self._map(lambda tensor: tensor[chosen])

    def key_order(self, order: Tensor) -> Problem:
        """The same problem with its keys in another place of the tensors."""
        return replace(
            self,
            keys=self.keys[:, :, order],
            values=self.values[:, :, order],
            index_keys=self.index_keys[:, :, order],
            key_positions=self.key_positions[:, order],
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another precision."""
        return self._map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def random_problem(
    q_len: int,
    k_len: int,
    *,
    padding: Sequence[int] = (0,),
    heads: int = 4,
    key_value_heads: int = 2,
    head_dim: int = 8,
    index_dim: int = 4,
    seed: int = 0,
    shared_index: bool = False,
) -> Problem:
    """The last `q_len` tokens of sequences of `k_len`, with so many places of left padding in each.

    Index scores resemble the attention logits, as a trained indexer's would, but are no copy.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, length: int, dim: int) -> Tensor:
        return torch.randn(
            len(padding), count, length, dim, generator=generator, dtype=torch.float64
        )

    positions = left_padded_positions(padding, k_len)
    queries, keys = normal(heads, q_len, head_dim) * 2, normal(key_value_heads, k_len, head_dim) * 2
    group = heads // key_value_heads
    per_head = keys.repeat_interleave(group, 1)
    scaling = head_dim**-0.5
    values = normal(key_value_heads, k_len, head_dim)
    index_queries = queries[..., :index_dim] * scaling + 0.3 * normal(heads, q_len, index_dim)
    index_keys = per_head[..., :index_dim] + 0.3 * normal(heads, k_len, index_dim)
    if shared_index:
        index_keys = index_keys[:, ::group].repeat_interleave(group, 1)
    return Problem(
        queries,
        keys,
        values,
        index_queries,
        index_keys,
        positions[:, k_len - q_len :],
        positions,
        scaling,
        shared_index,
    )


def left_padded_positions(padding: Sequence[int], width: int) -> Tensor:
    """Positions from 0 after the padding, which is -1."""
    return torch.tensor([[i - pad if i >= pad else -1 for i in range(width)] for pad in padding])


def sees(query: int, key: int) -> bool:
    """True if the causal mask lets a query see a key."""
    return key >= 0 and key <= query


def is_near(query: int, key: int, window: int, sinks: int) -> bool:
    """True if a key is a sink or in the window of W keys that ends with the query's own."""
    return sees(query, key) and (key < sinks or key >= query - window + 1)


def visible_keys(problem: Problem) -> Tensor:
    """Causal mask, bool [batch, heads, q_len, k_len]."""
    return _mask(problem, sees).expand(-1, problem.queries.shape[1], -1, -1)


def near_keys(problem: Problem, windows: int | Sequence[int], sinks: int) -> Tensor:
    """Sinks and window, bool [batch, heads, q_len, k_len]; one window, or one a head."""
    if isinstance(windows, int):
        mask = _mask(problem, lambda query, key: is_near(query, key, windows, sinks))
        return mask.expand(-1, problem.queries.shape[1], -1, -1)
    return torch.cat([near_keys(problem, window, sinks)[:, :1] for window in windows], 1)


def _mask(problem: Problem, allowed: Callable[[int, int], bool]) -> Tensor:
    sequences = zip(problem.query_positions.tolist(), problem.key_positions.tolist(), strict=True)
    return torch.tensor(
        [
            [[[allowed(query, key) for key in keys] for query in queries]]
            for queries, keys in sequences
        ]
    )


def exact_logits(problem: Problem) -> Tensor:
    """Scaled dot products in fp64, a loop over the query heads."""
    heads = [
        torch.einsum(
            "bqd,bkd->bqk", problem.queries[:, head].double(), problem.keys[:, kv].double()
        )
        for head, kv in enumerate(problem.kv_head_index.tolist())
    ]
    return torch.stack(heads, 1) * problem.scaling


def attend(problem: Problem, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over what the mask shows: output and log-sum-exp; 0 and -inf for blind rows."""
    logits, values = exact_logits(problem), problem.values[:, problem.kv_head_index].double()
    shown = logits.detach().masked_fill(~mask, -math.inf)
    peak = shown.amax(-1, keepdim=True).nan_to_num(neginf=0)
    weights = torch.where(mask, (logits - peak).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    output = torch.einsum("bhqk,bhkd->bhqd", weights, values) / total.clamp(min=1e-300)
    return output, (peak + total.log())[..., 0]


def top_p_set(mass: np.ndarray, target: float) -> set[int]:
    """The largest entries, as few as sum to the target; entries without mass never count."""
    if target <= 0:
        return set()
    order = np.argsort(-mass, kind="stable")[: np.count_nonzero(mass > 0)]
    reached = np.flatnonzero(np.cumsum(mass[order]) >= target)
    return set(order[: reached[0] + 1 if len(reached) else len(order)].tolist())


def heaviest(mass: np.ndarray, count: int) -> set[int]:
    """The `count` largest entries, fewer if fewer have mass."""
    order = np.argsort(-mass, kind="stable")[:count]
    return {int(entry) for entry in order if mass[entry] > 0}


def retrieval_keys(problem: Problem, rule: AttentionRule) -> Tensor:
    """Visible keys of selecting retrieval heads: near keys and chosen far ones."""
    near = near_keys(problem, rule.near_window, rule.num_sink_tokens)
    far = visible_keys(problem) & ~near
    shared = rule.prefill_mode in ("row_share", "row_peak") and problem.queries.shape[2] > 1
    exact = exact_logits(problem).numpy()
    index = torch.einsum(
        "bhqd,bhkd->bhqk", problem.index_queries.float(), problem.index_keys.float()
    ).numpy()
    seen = near.clone()
    for batch, head in np.ndindex(*near.shape[:2]):
        positions = problem.key_positions[batch].numpy()
        rows = [
            _row_mass(rule, exact[batch, head, row], index[batch, head, row], near_row, far_row)
            for row, (near_row, far_row) in enumerate(
                zip(near[batch, head].numpy(), far[batch, head].numpy(), strict=True)
            )
        ]
        if shared:
            chosen = _tile_sets(rule, rows, far[batch, head].numpy(), positions)
        else:
            chosen = [
                _row_set(rule, mass, near_row, far_row, positions)
                for mass, near_row, far_row in zip(
                    rows, near[batch, head].numpy(), far[batch, head].numpy(), strict=True
                )
            ]
        for row, keys in enumerate(chosen):
            seen[batch, head, row, sorted(keys)] |= far[batch, head, row, sorted(keys)]
    return seen


def _row_mass(
    rule: AttentionRule, exact: np.ndarray, index: np.ndarray, near: np.ndarray, far: np.ndarray
) -> np.ndarray:
    """The estimated probability of each key of one row under the rule's reading."""
    mass = np.zeros(len(near))
    seen = near | far
    if not seen.any():
        return mass
    logits = index if rule.reading == "paper" else np.where(near, exact, index)
    weights = np.exp(logits[seen] - logits[seen].max())
    mass[seen] = weights / weights.sum()
    return mass


def _row_set(
    rule: AttentionRule, mass: np.ndarray, near: np.ndarray, far: np.ndarray, positions: np.ndarray
) -> set[int]:
    """Keys that one row selects for itself."""
    if rule.top_p >= 1:
        return set(np.flatnonzero(far).tolist())
    candidates = mass if rule.reading == "paper" else np.where(far, mass, 0.0)
    target = rule.top_p
    if rule.reading == "residual":
        target = rule.top_p - mass[near].sum()
    elif rule.reading == "far":
        far_mass = mass[far].sum()
        target = rule.top_p * far_mass if far_mass > rule.far_floor else 0.0
    far_candidates = np.where(far, mass, 0.0)
    if rule.granularity == "token":
        return top_p_set(candidates, target) | heaviest(far_candidates, rule.min_tokens)
    blocks = top_p_set(_block_mass(rule, candidates, positions), target)
    floor = math.ceil(rule.min_tokens / rule.block_size)
    blocks |= heaviest(_block_mass(rule, far_candidates, positions), floor)
    return _keys_of(rule, blocks, positions)


def _tile_sets(
    rule: AttentionRule, rows: list[np.ndarray], far: np.ndarray, positions: np.ndarray
) -> list[set[int]]:
    """One list a tile of rows: a block is in if any row gives it `row_share` of its mass."""
    chosen: list[set[int]] = []
    for start in range(0, len(rows), rule.query_block_size):
        tile = range(start, min(start + rule.query_block_size, len(rows)))
        blocks: set[int] = set()
        for row in tile:
            if (len(rows) - 1 - row) % rule.row_stride:
                continue
            shares = _block_mass(rule, np.where(far[row], rows[row], 0.0), positions)
            if rule.prefill_mode == "row_peak":
                shares = _peak_shares(rule, rows[row], far[row], positions)
            blocks |= set(np.flatnonzero(shares >= rule.row_share).tolist())
        chosen += [_keys_of(rule, blocks, positions)] * len(tile)
    return chosen


def _block_mass(rule: AttentionRule, mass: np.ndarray, positions: np.ndarray) -> np.ndarray:
    real = positions >= 0
    return np.bincount(positions[real] // rule.block_size, weights=mass[real])


def _peak_shares(
    rule: AttentionRule, mass: np.ndarray, far: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """The strongest far key of each block, in addition to the near keys and the other blocks' strongest."""
    peaks = np.zeros(max(0, positions.max()) // rule.block_size + 1)
    for key in np.flatnonzero(far):
        block = positions[key] // rule.block_size
        peaks[block] = max(peaks[block], mass[key])
    total = mass[~far].sum() + peaks.sum()
    return peaks / total if total > 0 else peaks


def _keys_of(rule: AttentionRule, blocks: set[int], positions: np.ndarray) -> set[int]:
    chosen = np.isin(positions // rule.block_size, sorted(blocks)) & (positions >= 0)
    return set(np.flatnonzero(chosen).tolist())


def headwise_keys(
    problem: Problem,
    rule: AttentionRule,
    retrieval_heads: Sequence[int],
    num_decode_queries: int = 0,
) -> Tensor:
    """Visible keys of every head of a layer, bool [batch, heads, q_len, k_len]."""
    mask = near_keys(problem, rule.sliding_window, rule.num_sink_tokens).clone()
    retrieval = retrieval_keys(problem, rule)
    q_len = problem.queries.shape[2]
    if rule.prefill_mode == "dense" and q_len > 1:
        dense_rows = q_len - num_decode_queries
        retrieval = retrieval.clone()
        retrieval[:, :, :dense_rows] = visible_keys(problem)[:, :, :dense_rows]
    for head in retrieval_heads:
        mask[:, head] = retrieval[:, head]
    return mask


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
