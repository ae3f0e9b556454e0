"""Control with random retrieval heads."""

from __future__ import annotations

import random
from dataclasses import replace

from rtpurbo.config import HeadMap
from rtpurbo.evaluation.policies.policy import Policy
from rtpurbo.evaluation.policies.source import Loaded, Source
from rtpurbo.models.sparsify import sparsify


class RandomHeads(Policy):
    """Random retrieval heads that read everything, so that results do not depend on an index."""

    def prepare(self, source: Source) -> Loaded:
        """Returns the model."""
        model, tokenizer = source.sparse()
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


POLICY = RandomHeads(
    "random-heads",
    "control: the same number of heads, drawn at random, that read everything",
    keeps_index=False,
)
