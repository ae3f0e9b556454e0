"""Finds retrieval heads by elimination: windows one KV head after another, the one that changes answers least first.

    python experiments/head_elimination.py ARTIFACT -o head_map.json --data books.jsonl.gz

Prompts are dense, so a set of heads changes only what follows the prompt. Each prompt is therefore read once, and a
set is measured by the tokens after it: the divergence of its answers from those of the dense model. The search starts
from the best heads of the artifact's own ranking, `--extra` more than it keeps, and then tries swaps. Other sequences
than those of the search compare the ranking with what was found. `rtpurbo train-indexer --head-map` reads the output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.calibration.answer_sequences import SHARES, AnswerSequences, answer_positions
from rtpurbo.calibration.calibrate import Calibration
from rtpurbo.calibration.gates import gated_answers, gated_model, loss_after, prompt_length
from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.texts import load_texts
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load_base
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparsify import runtime
from rtpurbo.settings import CalibrationSettings, DistillationSettings
from rtpurbo.training.sequences import kind_at
from rtpurbo.training.source import random_access
from rtpurbo.training.teacher import targets_at

MEAN = DistillationSettings(answer_weight=0.0, decode_queries=0, top_logits=64)
"""Settings of a loss that is the mean divergence over all targets, from the most likely tokens."""

Heads = frozenset[tuple[int, int]]
"""Layers and KV heads that keep the full context."""


class Sequence:
    """Sequence whose prompt has been read, with the dense model's predictions of its answers.

    Args:
        model: inside `gated_model`.
        gates: of its KV heads.
        kind: kind of the sequence.
        conversation: with answers.
        rule: windows and heavy hitters.
    """

    def __init__(
        self, model: PreTrainedModel, gates: Mapping[int, Tensor], kind: str, conversation: Conversation,
        rule: AttentionRule,
    ) -> None:  # fmt: skip
        self.model, self.gates, self.kind = model, gates, kind
        self.conversation, self.rule = conversation, rule
        self.begin = prompt_length(model, rule, conversation)
        positions = torch.tensor(answer_positions(conversation))
        every = torch.ones(len(positions), dtype=torch.bool)
        with runtime(model).dense(), runtime(model).keeping_prompt(self.begin) as self.prompt:
            self.targets = targets_at(
                model, conversation.input_ids, positions, every, MEAN.top_logits
            )

    def divergence(self, kept: Heads) -> float:
        """Mean divergence from the dense model at the answers, in nats per token."""
        for layer, gate in self.gates.items():
            gate.copy_(torch.tensor([float((layer, head) in kept) for head in range(len(gate))]))
        prompt = self.prompt if self.begin else None
        with gated_answers(self.model, self.rule, self.gates, self.conversation, prompt):
            ids = self.conversation.input_ids
            return loss_after(self.model, self.begin, ids, self.targets, MEAN).item()


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


def compared(sequences: list[Sequence], sets: Mapping[str, Heads]) -> dict[str, dict[str, float]]:
    """Mean divergence with each set of heads, over all sequences and by their kind."""
    by_kind = {}
    for name, heads in sets.items():
        losses = [(each.kind, each.divergence(heads)) for each in sequences]
        by_kind[name] = {"all": fmean(loss for _, loss in losses)} | {
            kind: fmean(loss for each, loss in losses if each == kind)
            for kind in sorted({kind for kind, _ in losses})
        }
        print(name, {kind: round(loss, 5) for kind, loss in by_kind[name].items()}, flush=True)
    return by_kind


def main() -> None:
    """Searches, compares and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--data", action="append")
    parser.add_argument("--base-model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, help="tokens of a sequence; as in the calibration")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--lookups", type=float, default=0.2, help="share of the sequences")
    parser.add_argument("--keep", type=int, help="KV heads; as many as the artifact has")
    parser.add_argument("--extra", type=int, default=10)
    parser.add_argument("--per-round", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=2)
    arguments = parser.parse_args()

    stored = ArtifactConfig.read(arguments.artifact)
    head_map = stored.config.head_map
    # Retrieval heads read everything.
    rule = replace(stored.config.attention, layer_top_p=None)
    if not head_map.scores:
        sys.exit("the artifact's head map has no scores to begin with")
    calibration = stored.settings.get("calibration", {})
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    base = load_base(
        arguments.artifact, base_model=arguments.base_model, device=arguments.device, dtype=dtype
    )
    shares = {name: share * (1 - arguments.lookups) for name, share in SHARES.items()}
    source = AnswerSequences(
        base.tokenizer, random_access(load_texts(arguments.data, "train")),
        (arguments.length or calibration["length"],), stored.settings.get("seed", 0) + 3,
        {**shares, "lookup": arguments.lookups},
    )  # fmt: skip
    order = ranked(head_map)
    group_size = head_map.group_size(head_map.converted_layers[0])
    keep = arguments.keep or head_map.num_retrieval_heads // group_size
    begin = min(len(order), keep + arguments.extra)
    with torch.no_grad(), gated_model(base.model, rule, per_group=True) as gates:

        def sequences(numbers: Iterable[int]) -> list[Sequence]:
            drawn = [
                (kind_at(number, source.shares), source.sequence(number)) for number in numbers
            ]
            return [
                Sequence(base.model, gates, kind, each, rule)
                for kind, each in drawn
                if each.answer_spans
            ]

        searched = sequences(range(arguments.sequences))
        found = search(
            lambda kept: fmean(each.divergence(kept) for each in searched), order[:begin], order[begin:],
            keep=keep, per_round=arguments.per_round, swaps=arguments.swaps,
        )  # fmt: skip
        searched.clear()
        sets = {f"ranking, {n}": frozenset(order[:n]) for n in range(keep - 4, begin + 1, 2)}
        unseen = range(arguments.sequences, arguments.sequences + arguments.held_out)
        by_kind = compared(sequences(unseen), {**sets, f"found, {keep}": frozenset(found[:keep])})
    chosen = with_order(head_map, found, keep)
    known = CalibrationSettings(**calibration) if calibration else None
    result = Calibration(chosen, None, known).to_dict()
    write_json_atomically(arguments.output, {**result, "held_out": by_kind})


if __name__ == "__main__":
    main()
