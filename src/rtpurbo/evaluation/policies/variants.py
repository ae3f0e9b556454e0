"""The dense model, the artifact, and variants of its attention rule, heads and weights."""

from __future__ import annotations

from dataclasses import replace

from rtpurbo.evaluation.policies.policy import BUDGET_POLICY, DENSE_POLICY, Policy, RulePolicy
from rtpurbo.evaluation.policies.source import Loaded, Source
from rtpurbo.models.sparsify import empty_head_map, sparsify


class Full(Policy):
    """Dense model: every head of the base model reads everything."""

    def prepare(self, source: Source) -> Loaded:
        """Returns the model."""
        return source.dense()


class LocalOnly(Policy):
    """Sinks and window for every head, as in StreamingLLM (arXiv 2309.17453)."""

    def prepare(self, source: Source) -> Loaded:
        """Returns the model."""
        model, tokenizer = source.sparse()
        sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
        return model, tokenizer


VARIANTS = (
    Full(DENSE_POLICY, "the dense model before conversion"),
    RulePolicy(BUDGET_POLICY, "the sparse model of the artifact"),
    # The paper (arXiv 2605.16928): mass is a share of the indexer's softmax over every visible key.
    RulePolicy(
        "rtpurbo-paper",
        "the same, selecting as the paper does: top-p over all keys, no minimum of tokens",
        changes={"reading": "paper", "min_tokens": 0},
    ),
    # Near keys count with their exact mass, far ones by the indexer; the artifact's minimum of tokens is kept.
    RulePolicy(
        "rtpurbo-residual",
        "the same with the reading `residual`: far tokens are added to the near mass",
        changes={"reading": "residual"},
    ),
    RulePolicy(
        "rtpurbo-sparse-prefill",
        "the same, selecting in the prompt too: one block list for each query block",
        changes={"prefill_mode": "row_share"},
    ),
    RulePolicy(
        "rtpurbo-float8-index",
        "the same, with index keys in float8",
        changes={"index_storage": "float8"},
    ),
    # The indexers of stage 1 on the dense model's weights.
    RulePolicy(
        "rtpurbo-before-stage2",
        "the sparse model with the weights of the dense one",
        stage2=False,
    ),
    # As in RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819), with rtpurbo's heads and weights.
    RulePolicy(
        "dense-heads",
        "retrieval heads read everything, the others windows (RazorAttention, DuoAttention)",
        keeps_index=False,
        changes={"top_p": 1.0},
    ),
)

LOCAL_ONLY = LocalOnly(
    "local-only", "control: no retrieval head, sinks and window alone (StreamingLLM)"
)
