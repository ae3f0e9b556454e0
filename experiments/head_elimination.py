"""Finds retrieval heads by elimination: windows one KV head after another, the one that changes answers least first.

    python experiments/head_elimination.py ARTIFACT -o head_map.json --data books.jsonl.gz

Prompts are dense, so a set of heads changes only what follows the prompt. Each prompt is therefore read once, and a
set is measured by the tokens after it: the divergence of its answers from those of the dense model. The search starts
from the best heads of the artifact's own ranking, `--extra` more than it keeps, and then tries swaps. Other sequences
than those of the search compare the ranking with what was found. `rtpurbo train-indexer --head-map` reads the output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache

from rtpurbo.calibration.answer_sequences import SHARES, AnswerSequences
from rtpurbo.calibration.calibrate import Calibration
from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.texts import load_texts
from rtpurbo.files import write_json_atomically
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.artifact import load_base
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.ops.eager.heavy_hitters import OBSERVED_QUERIES, heavy_hitters
from rtpurbo.ops.states import KeyValueStates
from rtpurbo.settings import CalibrationSettings
from rtpurbo.training.sequences import kind_at
from rtpurbo.training.source import random_access

KEPT_LOGITS = 64
"""Most likely tokens of the dense model whose probabilities count, with the sum of all others."""

Heads = frozenset[tuple[int, int]]
"""Layers and KV heads that keep the full context."""


class Probe:
    """Attention of all layers: dense, or windowed in the answers for all KV heads but some.

    Attributes:
        seen: queries, keys and scaling of the last forward, by layer.
        kept: heads with the full context; None for dense attention.
        reading: the sequence whose tail is read; None for a prompt.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.kept: Heads | None = None
        self.reading: Sequence | None = None
        AttentionInterface.register("probe", self.attention)
        model.set_attn_implementation("probe")

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of a layer, in transformers' interface; what is seen does not depend on `mask`."""
        layer, group = module.layer_idx, query.shape[1] // key.shape[1]
        self.seen[layer] = query, key, options["scaling"]
        visible = None
        if self.reading is not None:
            visible = self.reading.visible(layer, self.kept).repeat_interleave(group, 0)[None]
        output = F.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1),
            attn_mask=visible, is_causal=visible is None, scale=options["scaling"],
        )  # fmt: skip
        return output.transpose(1, 2), None


class Sequence:
    """Sequence whose prompt is in a cache, with the dense model's predictions of its answers.

    Args:
        model: dense, with the attention of `probe`.
        probe: attention of the model.
        kind: kind of the sequence.
        conversation: with answers.
        rule: windows and heavy hitters.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, probe: Probe, kind: str, conversation: Conversation, rule: AttentionRule
    ) -> None:  # fmt: skip
        self.model, self.probe, self.kind = model, probe, kind
        ids = torch.tensor(conversation.input_ids[:-1], device=model.device)[None]
        # The first token of an answer is predicted by the last of the text before it, which is dense.
        spans = [slice(first, end - 1) for first, end in conversation.answer_spans]
        begin = spans[0].start
        self.tail = ids[:, begin:]
        answers = [place - begin for span in spans for place in range(span.start, span.stop)]
        self.rows = torch.tensor(answers, device=model.device)
        self.cache = DynamicCache(config=model.config)
        probe.reading = None
        model(input_ids=ids[:, :begin], logits_to_keep=1, **self._cached())
        last = {layer: seen[0][:, :, -OBSERVED_QUERIES:] for layer, seen in probe.seen.items()}

        places = torch.arange(ids.shape[1], device=model.device)
        self.causal = places[None] <= places[begin:, None]
        top = self.log_probabilities(None).topk(KEPT_LOGITS)
        self.targets = top.values, top.indices
        self.windowed = {}
        for layer, (query, key, scaling) in probe.seen.items():
            queries = torch.cat([last[layer], query], 2)
            self.windowed[layer] = self.causal[None].repeat(key.shape[1], 1, 1)
            for span in spans:
                before = queries.shape[2] - (ids.shape[1] - span.start)
                slots = heavy_hitters(
                    queries[:, :, :before],
                    places[None, span.start - before : span.start],
                    KeyValueStates(key, key, places[None]).tokens(slice(0, span.start)),
                    rule,
                    scaling=scaling,
                )[0]
                is_there = bool((slots >= 0).all())
                sinks = rule.num_fixed_sinks if is_there else rule.num_sink_tokens
                near = places[None] > places[span, None] - rule.sliding_window
                read = (near | (places < sinks))[None].repeat(key.shape[1], 1, 1)
                if is_there:
                    read.scatter_(2, slots[:, None].expand(-1, read.shape[1], -1), True)
                self.windowed[layer][:, span.start - begin : span.stop - begin] &= read

    def _cached(self) -> dict[str, Any]:
        return {CACHE_NAME: self.cache, "use_cache": True}

    def visible(self, layer: int, kept: Heads | None) -> Tensor:
        """Keys that each KV head sees: bool [num_key_value_heads or 1, tail, tokens]."""
        if kept is None:
            return self.causal[None].expand(self.cache.layers[layer].keys.shape[1], -1, -1)
        windowed = self.windowed[layer]
        full = torch.tensor([(layer, head) in kept for head in range(len(windowed))])
        return torch.where(full.to(windowed.device)[:, None, None], self.causal, windowed)

    @torch.no_grad()
    def log_probabilities(self, kept: Heads | None) -> Tensor:
        """Log-probabilities at the answers: fp32 [rows, vocabulary]."""
        self.probe.reading, self.probe.kept = self, kept
        output = self.model(input_ids=self.tail, logits_to_keep=self.rows, **self._cached())
        self.cache.crop(-self.tail.shape[1])
        return output.logits[0].float().log_softmax(-1)

    def divergence(self, kept: Heads) -> float:
        """Mean divergence from the dense model at the answers, in nats per token."""
        expected, tokens = self.targets
        found = self.log_probabilities(kept).gather(1, tokens)
        rest, rest_found = (1 - each.exp().sum(1) for each in (expected, found))
        beyond = rest * (rest.clamp(min=1e-9) / rest_found.clamp(min=1e-9)).log()
        return ((expected.exp() * (expected - found)).sum(1) + beyond).mean().item()


def ranked(head_map: HeadMap) -> list[tuple[int, int]]:
    """KV heads by their best query head, best first."""
    scores = {}
    for layer in head_map.converted_layers:
        row, size = head_map.scores[layer], head_map.group_size(layer)
        assert row is not None
        for head in range(len(row) // size):
            scores[layer, head] = max(row[head * size : (head + 1) * size])
    return sorted(scores, key=lambda head: -scores[head])


def search(
    loss: Callable[[Heads], float], start: list[tuple[int, int]], others: list[tuple[int, int]],
    *, keep: int, per_round: int, swaps: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Returns heads in the order of their removal, reversed: the first `keep` are those found.

    Args:
        loss: of a set of heads.
        start: heads to begin with.
        others: heads that only swaps may bring in.
        keep: heads to find.
        per_round: heads removed at a time.
        swaps: rounds of swaps, each of `per_round` heads.
    """
    kept, removed = set(start), list(others)

    def remove(count: int) -> None:
        losses = {head: loss(frozenset(kept - {head})) for head in sorted(kept)}
        for head in sorted(losses, key=losses.__getitem__)[:count]:
            kept.discard(head)
            removed.insert(0, head)
        print(
            f"{len(kept)} heads: {loss(frozenset(kept)):.5f}, removed {removed[:count]}", flush=True
        )

    while len(kept) > keep:
        remove(min(per_round, len(kept) - keep))
    for _ in range(swaps):
        losses = {head: loss(frozenset(kept | {head})) for head in removed}
        added = sorted(losses, key=losses.__getitem__)[:per_round]
        print(f"added {added}", flush=True)
        kept |= set(added)
        removed = [head for head in removed if head not in added]
        remove(per_round)
    return [*sorted(kept), *removed]


def with_order(head_map: HeadMap, order: list[tuple[int, int]], keep: int) -> HeadMap:
    """Head map with the first `keep` KV heads of an order, whose places are the scores."""
    scores, heads = list(head_map.scores), list(head_map.retrieval_heads)
    place = {head: 1 - number / len(order) for number, head in enumerate(order)}
    for layer in head_map.converted_layers:
        size, total = head_map.group_size(layer), head_map.num_query_heads(layer)
        scores[layer] = tuple(place[layer, head // size] for head in range(total))
        heads[layer] = tuple(head for head in range(total) if (layer, head // size) in order[:keep])
    return replace(head_map, scores=tuple(scores), retrieval_heads=tuple(heads))


def main() -> None:
    """Searches, compares and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--data", action="append")
    parser.add_argument("--base-model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, help="tokens of a sequence; as in the calibration")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--lookups", type=float, default=0.2, help="share of the sequences")
    parser.add_argument("--keep", type=int, help="KV heads; as many as the artifact has")
    parser.add_argument("--extra", type=int, default=10)
    parser.add_argument("--per-round", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=2)
    arguments = parser.parse_args()

    stored = ArtifactConfig.read(arguments.artifact)
    rule, head_map = stored.config.attention, stored.config.head_map
    if not head_map.scores:
        sys.exit("the artifact's head map has no scores to begin with")
    calibration = stored.settings.get("calibration", {})
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    base = load_base(
        arguments.artifact, base_model=arguments.base_model, device=arguments.device, dtype=dtype
    )
    probe = Probe(base.model)
    shares = {name: share * (1 - arguments.lookups) for name, share in SHARES.items()}
    source = AnswerSequences(
        base.tokenizer, random_access(load_texts(arguments.data, "train")),
        (arguments.length or calibration["length"],), stored.settings.get("seed", 0) + 3,
        {**shares, "lookup": arguments.lookups},
    )  # fmt: skip

    def sequences(numbers: Iterable[int]) -> list[Sequence]:
        drawn = [(number, source.sequence(number)) for number in numbers]
        return [
            Sequence(base.model, probe, kind_at(number, source.shares), each, rule)
            for number, each in drawn
            if any(end - first > 1 for first, end in each.answer_spans)
        ]

    searched = sequences(range(arguments.sequences))
    order, size = ranked(head_map), head_map.num_retrieval_heads
    first = head_map.converted_layers[0]
    keep = arguments.keep or size // head_map.group_size(first)
    begin = min(len(order), keep + arguments.extra)
    found = search(
        lambda kept: fmean(each.divergence(kept) for each in searched),
        order[:begin], order[begin:], keep=keep, per_round=arguments.per_round, swaps=arguments.swaps,
    )  # fmt: skip
    searched.clear()
    unseen = sequences(range(arguments.sequences, arguments.sequences + arguments.held_out))
    sets: Mapping[str, Heads] = {
        **{f"ranking, {n}": frozenset(order[:n]) for n in range(keep - 4, begin + 1, 2)},
        f"found, {keep}": frozenset(found[:keep]),
    }
    by_kind: dict[str, dict[str, float]] = {}
    for name, heads in sets.items():
        losses = [(each.kind, each.divergence(heads)) for each in unseen]
        kinds = sorted({kind for kind, _ in losses})
        by_kind[name] = {"all": fmean(loss for _, loss in losses)} | {
            kind: fmean(loss for each, loss in losses if each == kind) for kind in kinds
        }
        print(
            name,
            json.dumps({kind: round(loss, 5) for kind, loss in by_kind[name].items()}),
            flush=True,
        )
    chosen = with_order(head_map, found, keep)
    known = CalibrationSettings(**calibration) if calibration else None
    result = Calibration(chosen, None, known).to_dict()
    write_json_atomically(arguments.output, {**result, "held_out": by_kind})


if __name__ == "__main__":
    main()
