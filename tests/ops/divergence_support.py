"""Random heads with indexers over packed documents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.packed import document_starts

RULE = AttentionRule(num_sink_tokens=3, sliding_window=40, block_size=16)
SCALING = 0.4


@dataclass(frozen=True)
class IndexerProblem:
    """Arguments of `indexer_divergence`, and an upstream gradient [heads, rows]."""

    query_states: Tensor
    key_states: Tensor
    key_value_heads: Tensor
    index_queries: Tensor
    index_keys: Tensor
    rows: Tensor
    starts: Tensor
    upstream: Tensor

    def to(self, device, states: torch.dtype, index: torch.dtype):
        """The same elsewhere, in other types."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        for name in ("query_states", "key_states"):
            moved[name] = moved[name].to(states)
        for name in ("index_queries", "index_keys", "upstream"):
            moved[name] = moved[name].to(index)
        return IndexerProblem(**moved)

    def run(self, operator, rule, **options):
        """Losses, and gradients of index queries and index keys."""
        queries, keys = (
            states.detach().clone().requires_grad_()
            for states in (self.index_queries, self.index_keys)
        )
        arguments = vars(replace(self, index_queries=queries, index_keys=keys)).copy()
        upstream = arguments.pop("upstream")
        losses = operator(*arguments.values(), rule, scaling=SCALING, **options)
        losses.backward(upstream.to(losses.dtype))
        return losses.detach(), queries.grad, keys.grad


def indexer_problem(
    documents, head_dim=16, index_dim=8, rows=None, heads=3, key_value_heads=2, seed=0
) -> IndexerProblem:
    """In fp64, with values that half precision holds; every row unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    length = sum(documents)
    places = torch.arange(length) if rows is None else torch.tensor(rows, dtype=torch.int64)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    return IndexerProblem(
        draw(heads, length, head_dim)[:, places],
        draw(key_value_heads, length, head_dim),
        torch.arange(heads) * key_value_heads // heads,
        draw(heads, length, index_dim)[:, places],
        draw(heads, length, index_dim),
        places,
        document_starts(documents, "cpu"),
        draw(heads, len(places)),
    )
