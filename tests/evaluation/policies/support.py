"""Rows of retrieval heads, as selectors are shown them."""

from functools import partial

import torch

from rtpurbo.ops import SelectionQueries
from rtpurbo.ops.eager.selection import index_scores
from rtpurbo.ops.eager.visibility import causal_mask, near_mask
from tests.oracles import random_problem

WINDOW, SINKS = 16, 2


def random_queries(q_len, k_len, padding=(0, 7)):
    """Rows of a random layer."""
    problem = random_problem(q_len, k_len, padding=padding)
    keys = problem.keys[:, problem.kv_head_index]
    near = near_mask(problem.query_positions, problem.key_positions, WINDOW, SINKS)
    return SelectionQueries(
        problem.queries,
        keys,
        problem.query_positions,
        problem.key_positions,
        problem.queries @ keys.transpose(-1, -2) * problem.scaling,
        near,
        causal_mask(problem.query_positions, problem.key_positions) & ~near,
        partial(index_scores, problem.index_queries, problem.index_keys),
    )


def every_query(rows):
    """Places (batch, head, row) of all rows."""
    return torch.cartesian_prod(*(torch.arange(size) for size in rows.logits.shape[:3])).tolist()
