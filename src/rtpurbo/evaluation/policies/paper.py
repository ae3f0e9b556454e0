"""The paper's reading of top-p (arXiv 2605.16928)."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import RulePolicy

# Mass is a share of the indexer's softmax over every visible key, and nothing is read beside that.
POLICY = RulePolicy(
    "rtpurbo-paper",
    "the same, selecting as the paper does: top-p over all keys, no floor of tokens",
    place=11,
    changes={"reading": "paper", "min_tokens": 0},
)
