"""Retrieval attention of a random problem."""

from rtpurbo.config import AttentionRule
from rtpurbo.ops import retrieval_attention

RULE = AttentionRule(
    num_sink_tokens=2,
    min_tokens=2,
    sliding_window=16,
    block_size=8,
    query_block_size=16,
    top_p=0.7,
    prefill_mode="top_p",
)


def run(problem, rule, **options):
    """Output and log-sum-exp."""
    return retrieval_attention(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        problem.index_queries,
        rule,
        scaling=problem.scaling,
        return_log_sum_exp=True,
        **options,
    )
