"""Policies to compare: a name, a model made from an artifact, and the size of its cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import HeadMap, RTPurboConfig
from rtpurbo.evaluation.memory import cache_bytes, full_key_bytes
from rtpurbo.evaluation.policies.selectors import PAGE_SIZE, oracle_top_p, quest, top_k
from rtpurbo.models.artifact import load, load_base
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, set_selector, sparsify
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
        base = load_base(self.folder, **self._options)
        return base.model, base.tokenizer

    def sparse(self, *, stage2: bool = True) -> Loaded:
        """Returns the sparse model, with or without the weights of stage 2."""
        return load(self.folder, stage2=stage2, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"base_model": self.base_model, "device": self.device, "dtype": self.dtype}


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


def _with_rule(name: str, description: str, *, keeps_index: bool = True, **changes: Any) -> Policy:
    """Returns the policy of the sparse model with some fields of its attention rule changed."""

    def prepare(source: Source) -> Loaded:
        model, tokenizer = source.sparse()
        model.rtpurbo.set_rule(**changes)
        return model, tokenizer

    return Policy(name, description, prepare, keeps_index)


def _oracle(source: Source) -> Loaded:
    model, tokenizer = source.sparse()
    for layer in headwise_modules(model):  # each may have a top-p of its own
        layer.selector = oracle_top_p(layer.rule)
    return model, tokenizer


def _local_only(source: Source) -> Loaded:
    model, tokenizer = source.sparse()
    sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
    return model, tokenizer


def _random_heads(source: Source) -> Loaded:
    model, tokenizer = source.sparse()
    # Retrieval heads read everything, so that results do not depend on an index.
    config = model.rtpurbo_config.with_rule(top_p=1.0)
    sparsify(model, replace(config, head_map=random_head_map(config.head_map, source.seed)))
    return model, tokenizer


def random_head_map(head_map: HeadMap, seed: int) -> HeadMap:
    """Returns a map with the same number of retrieval heads in the same layers, drawn at random."""
    rng = random.Random(f"random-heads-{seed}")
    layers = [layer for layer, heads in enumerate(head_map.retrieval_heads) if heads]
    every = [(layer, head) for layer in layers for head in range(head_map.num_query_heads(layer))]
    drawn = sorted(rng.sample(every, head_map.num_retrieval_heads))
    retrieval_heads = tuple(
        None if heads is None else tuple(head for place, head in drawn if place == layer)
        for layer, heads in enumerate(head_map.retrieval_heads)
    )
    return replace(head_map, retrieval_heads=retrieval_heads, scores=())


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(DENSE_POLICY, "the dense model before conversion", Source.dense),
        Policy(BUDGET_POLICY, "the sparse model of the artifact"),
        # The paper (arXiv 2605.16928): mass is a share of the indexer's softmax over every visible key.
        _with_rule(
            "rtpurbo-paper",
            "the same, selecting as the paper does: top-p over all keys, no minimum of tokens",
            reading="paper",
            min_tokens=0,
        ),
        # Near keys count with their exact mass, far ones by the indexer; the artifact's minimum of tokens is kept.
        _with_rule(
            "rtpurbo-residual",
            "the same with the reading `residual`: far tokens are added to the near mass",
            reading="residual",
        ),
        _with_rule(
            "rtpurbo-sparse-prefill",
            "the same, selecting in the prompt too: one block list for each query block",
            prefill_mode="row_share",
        ),
        _with_rule(
            "rtpurbo-float8-index",
            "the same, with index keys in float8",
            index_storage="float8",
        ),
        # The indexers of stage 1 on the dense model's weights.
        Policy(
            "rtpurbo-before-stage2",
            "the sparse model with the weights of the dense one",
            lambda source: source.sparse(stage2=False),
        ),
        # As in RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819), with rtpurbo's heads and weights.
        _with_rule(
            "dense-heads",
            "retrieval heads read everything, the others windows (RazorAttention, DuoAttention)",
            keeps_index=False,
            top_p=1.0,
        ),
        BudgetPolicy(
            "quest",
            f"pages of {PAGE_SIZE} tokens by Quest's bounds; rtpurbo's mean budget",
            keeps_index=False,
            selector=quest,
            page_size=PAGE_SIZE,
        ),
        BudgetPolicy(
            "top-k",
            "the same number of far tokens for every query, by the index; rtpurbo's mean budget",
            selector=top_k,
        ),
        Policy(
            "oracle-top-p",
            "the artifact's top-p by exact attention instead of the index",
            _oracle,
            keeps_index=False,
        ),
        # As in StreamingLLM (arXiv 2309.17453).
        Policy(
            "local-only",
            "control: no retrieval head, sinks and window alone (StreamingLLM)",
            _local_only,
        ),
        Policy(
            "random-heads",
            "control: the same number of heads, drawn at random, that read everything",
            _random_heads,
            keeps_index=False,
        ),
    )
}
"""Every policy by name, in display order."""
