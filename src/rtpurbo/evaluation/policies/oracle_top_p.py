"""Top-p selection by exact attention instead of the index: the upper bound of any index."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.evaluation.policies.policy import Policy
from rtpurbo.evaluation.policies.source import Loaded, Source
from rtpurbo.models.sparsify import set_selector
from rtpurbo.ops import SelectionQueries
from rtpurbo.ops.eager.selection import estimated_logits, select_per_query


@dataclass(frozen=True)
class OracleSelector:
    """Selection by a rule from exact logits.

    Attributes:
        rule: attention rule.
    """

    rule: AttentionRule

    def __call__(self, rows: SelectionQueries) -> Tensor:
        """Returns the selected far keys of each query: bool [batch, heads, queries, k_len]."""
        logits = estimated_logits(self.rule.reading, rows.logits, rows.logits, rows.near, rows.far)
        return select_per_query(self.rule, logits, rows.near, rows.far, rows.key_positions)


class OracleTopP(Policy):
    """The artifact's rule with exact scores, which cost as much as dense attention."""

    def prepare(self, source: Source) -> Loaded:
        """Returns the model."""
        model, tokenizer = source.sparse()
        set_selector(model, OracleSelector(model.rtpurbo_config.attention))
        return model, tokenizer


POLICY = OracleTopP(
    "oracle-top-p",
    "the artifact's top-p by exact attention instead of the index",
    keeps_index=False,
)
