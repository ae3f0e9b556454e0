"""Retrieval attention of a random problem."""

from rtpurbo.ops import retrieval_attention


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
