"""What is compared: the dense model, its sparse versions, and controls that should do worse."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import HeadMap
from rtpurbo.models.artifact import load, load_base
from rtpurbo.models.sparsify import empty_head_map, set_rule, sparsify

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Source:
    """An artifact, and how to load models from it.

    Attributes:
        folder: the artifact's.
        device: where to put models.
        dtype: of their weights.
        base_model: where to take the base model from, if not from where the artifact says.
        seed: of what a policy draws.
    """

    folder: Path
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    seed: int = 0

    def dense(self) -> Loaded:
        """The base model."""
        base = load_base(
            self.folder, base_model=self.base_model, device=self.device, dtype=self.dtype
        )
        return base.model, base.tokenizer

    def sparse(self, *, stage2: bool = True) -> Loaded:
        """The sparse model, with the weights of stage 2 or those before it."""
        return load(
            self.folder,
            base_model=self.base_model,
            stage2=stage2,
            device=self.device,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Policy:
    """One of the things compared.

    Attributes:
        name: short, for commands and tables.
        description: one line.
        prepare: makes the model.
    """

    name: str
    description: str
    prepare: Callable[[Source], Loaded]


def _sparse_prefill(source: Source) -> Loaded:
    model, tokenizer = source.sparse()
    set_rule(model, prefill_mode="row_share")
    return model, tokenizer


def _local_only(source: Source) -> Loaded:
    model, tokenizer = source.sparse()
    sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
    return model, tokenizer


def _random_heads(source: Source) -> Loaded:
    model, tokenizer = source.sparse()
    config = model.rtpurbo_config.with_rule(top_p=1.0)
    sparsify(model, replace(config, head_map=random_head_map(config.head_map, source.seed)))
    return model, tokenizer


def random_head_map(head_map: HeadMap, seed: int) -> HeadMap:
    """As many retrieval heads in the same layers as `head_map` has, drawn at random."""
    rng = random.Random(f"random-heads-{seed}")
    layers = [layer for layer, heads in enumerate(head_map.retrieval_heads) if heads]
    every = [(layer, head) for layer in layers for head in range(head_map.num_attention_heads)]
    drawn = sorted(rng.sample(every, head_map.num_retrieval_heads))
    retrieval_heads = tuple(
        None if heads is None else tuple(head for place, head in drawn if place == layer)
        for layer, heads in enumerate(head_map.retrieval_heads)
    )
    return replace(head_map, retrieval_heads=retrieval_heads, scores=())


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("full", "the dense model before conversion", Source.dense),
        Policy("rtpurbo", "the sparse model", Source.sparse),
        Policy(
            "rtpurbo-sparse-prefill",
            "the same, selecting in the prompt too: one block list for a tile of rows",
            _sparse_prefill,
        ),
        Policy(
            "rtpurbo-before-stage2",
            "the sparse model with the weights of the dense one",
            lambda source: source.sparse(stage2=False),
        ),
        Policy("local-only", "control: no retrieval head, sinks and window alone", _local_only),
        Policy(
            "random-heads",
            "control: as many heads, drawn at random, that read everything",
            _random_heads,
        ),
    )
}
"""Every policy by name, in display order."""
