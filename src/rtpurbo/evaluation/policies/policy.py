"""Policy: a name, a model made from an artifact, and the size of its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import RTPurboConfig
from rtpurbo.evaluation.memory import cache_bytes, full_key_bytes
from rtpurbo.models.artifact import load, load_base
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparsify import set_selector
from rtpurbo.ops import Selector

DENSE_POLICY = "full"
"""Policy that all others are compared with."""

BUDGET_POLICY = "rtpurbo"
"""Policy whose mean number of far tokens read is the budget of each `BudgetPolicy`."""

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Source:
    """Artifact with options for loading.

    Attributes:
        folder: folder of the artifact.
        device: device of the models.
        dtype: dtype of the weights.
        base_model: replaces the base model that the artifact names.
        seed: seed of random policies.
    """

    folder: Path
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    seed: int = 0

    @property
    def config(self) -> RTPurboConfig:
        """Head map, attention rule and indexer settings of the artifact."""
        return ArtifactConfig.read(self.folder).config

    def dense(self) -> Loaded:
        """Returns the base model."""
        base = load_base(
            self.folder, base_model=self.base_model, device=self.device, dtype=self.dtype
        )
        return base.model, base.tokenizer

    def sparse(self, *, stage2: bool = True) -> Loaded:
        """Returns the sparse model, with or without the weights of stage 2."""
        return load(
            self.folder,
            base_model=self.base_model,
            stage2=stage2,
            device=self.device,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Policy:
    """Policy to compare.

    Attributes:
        name: short name, for commands and tables.
        description: description in one line.
        prepare: returns the model.
        keeps_index: True if the cache has index keys.
    """

    name: str
    description: str
    prepare: Callable[[Source], Loaded] = Source.sparse
    keeps_index: bool = True

    def kv_bytes(self, model: PreTrainedModel, context_length: int) -> int:
        """Returns the cache size of one sequence in bytes."""
        return cache_bytes(model, context_length, index_keys=self.keeps_index)


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(Policy):
    """The artifact's sparse model, whose retrieval heads read a given number of far tokens.

    Attributes:
        selector: returns the selection of a number of far tokens.
        page_size: tokens per page, whose two bounds are in the cache; None without pages.
    """

    selector: Callable[[int], Selector]
    page_size: int | None = None

    def set_budget(self, model: PreTrainedModel, far_tokens: int) -> None:
        """Sets the number of far tokens that a query of the next case may read."""
        set_selector(model, self.selector(far_tokens))

    def kv_bytes(self, model: PreTrainedModel, context_length: int) -> int:
        """Returns the cache size of one sequence in bytes, with two keys per page."""
        pages = 0 if self.page_size is None else -(-context_length // self.page_size)
        return super().kv_bytes(model, context_length) + 2 * full_key_bytes(model, pages)
