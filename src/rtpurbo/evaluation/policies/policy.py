"""Policy: a name, a model made from an artifact, and the size of its cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.evaluation.policies.source import Loaded, Source
from rtpurbo.models.sparsify import set_rule, set_selector
from rtpurbo.ops import Selector

DENSE_POLICY = "full"
"""Policy that all others are compared with."""

BUDGET_POLICY = "rtpurbo"
"""Policy whose mean number of far tokens read is the budget of each `BudgetPolicy`."""


@dataclass(frozen=True)
class Policy(ABC):
    """Policy to compare.

    Attributes:
        name: short name, for commands and tables.
        description: description in one line.
        keeps_index: True if the cache has index keys.
    """

    name: str
    description: str
    keeps_index: bool = True

    @abstractmethod
    def prepare(self, source: Source) -> Loaded:
        """Returns the model."""

    def kv_bytes(self, model: PreTrainedModel, context_length: int) -> int:
        """Returns the cache size of one sequence in bytes."""
        return cache_bytes(model, context_length, index_keys=self.keeps_index)


@dataclass(frozen=True)
class RulePolicy(Policy):
    """The artifact's sparse model with some fields of its attention rule changed.

    Attributes:
        changes: changed fields.
        stage2: True for the weights of stage 2.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    stage2: bool = True

    def prepare(self, source: Source) -> Loaded:
        """Returns the model."""
        model, tokenizer = source.sparse(stage2=self.stage2)
        set_rule(model, **self.changes)
        return model, tokenizer


@dataclass(frozen=True)
class BudgetPolicy(Policy):
    """The artifact's sparse model, whose retrieval heads read a given number of far tokens."""

    def prepare(self, source: Source) -> Loaded:
        """Returns the model, without a budget."""
        return source.sparse()

    def set_budget(self, model: PreTrainedModel, far_tokens: int) -> None:
        """Sets the number of far tokens that a query of the next case may read."""
        set_selector(model, self.selector(far_tokens))

    @abstractmethod
    def selector(self, far_tokens: int) -> Selector:
        """Returns the selection of that many far tokens."""
