"""How much an index makes a head read for the same attention mass."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from long_tasks import make_examples
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ablations.questions import fitting_tasks
from rtpurbo.config import AttentionRule
from rtpurbo.data.texts import TextCorpus, begin_ids
from rtpurbo.models.base import BaseModel
from rtpurbo.ops.eager.divergence import forward_divergence
from rtpurbo.ops.eager.selection import block_ids, masses, sum_blocks, target_mass
from rtpurbo.training.capture import CapturedHeads, capture_heads
from rtpurbo.training.indexer_loss import query_logits

TOP_P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
ROW_SHARES = (0.5, 0.25, 0.125, 0.0625, 1 / 32, 1 / 64, 1 / 128, 1 / 512)
RECALLS = (0.9, 0.95, 0.98)
TILES = 4
NUM_PROSE = 2


@dataclass
class Curve:
    """Mean recall and mean cost at each of some settings, over rows and heads.

    Attributes:
        recall: sums of the attention mass on what is read.
        cost: sums of what is read.
        rows: how many rows of heads were added up.
    """

    recall: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    rows: float = 0.0

    def add(self, recall: Sequence[float], cost: Sequence[float], rows: int) -> None:
        """Adds sums over some rows, one for each setting."""
        if not self.recall:
            self.recall, self.cost = [0.0] * len(recall), [0.0] * len(cost)
        self.recall = [old + new for old, new in zip(self.recall, recall, strict=True)]
        self.cost = [old + new for old, new in zip(self.cost, cost, strict=True)]
        self.rows += rows

    def points(self) -> list[tuple[float, float]]:
        """(recall, cost) of each setting, least recall first."""
        pairs = zip(self.recall, self.cost, strict=True)
        return sorted((kept / self.rows, cost / self.rows) for kept, cost in pairs)

    def cost_at(self, recall: float) -> float | None:
        """The cost at a recall, between the settings around it; None beyond all of them.

        Straight lines between logarithms: of the cost, and of what is missing in recall.
        """
        points = self.points()
        for (low, below), (high, above) in pairwise(points):
            if low <= recall <= high:
                left, right, here = (math.log(max(1 - r, 1e-9)) for r in (low, high, recall))
                part = 0.0 if left == right else (here - left) / (right - left)
                floor = 1e-9
                return math.exp(
                    (1 - part) * math.log(max(below, floor)) + part * math.log(max(above, floor))
                )
        return None


@torch.no_grad()
def index_quality(
    base: BaseModel,
    corpus: TextCorpus,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    *,
    oracle: bool = False,
) -> dict[str, Any]:
    """Sweeps over p and over shares on the dense model's states.

    Args:
        base: sparse, with trained indexers.
        corpus: held-out prose.
        lengths: of what is read, in tokens.
        samples: questions whose answer rows are looked at, of each length.
        seed: of texts and questions.
        oracle: take exact scores for the indexers'.

    Returns:
        For each length: `divergence`; `tokens` read a row at several recalls, of prose rows and of
        rows that answer (if tasks fit the length); `blocks`, the share of far keys in one list a tile
        of rows; and `at_p`, the recall and tokens of prose at each p.
    """
    found = {}
    for length in lengths:
        rule = replace(base.model.rtpurbo_config.attention, min_tokens=0)
        tokens, blocks, answers = Curve(), Curve(), Curve()
        divergence, heads = 0.0, 0
        for number in range(NUM_PROSE):
            for seen in capture_heads(
                base.model, prose(base.tokenizer, corpus, length, seed, number)
            ):
                for rows in tiles(length, rule, base.model.device):
                    logits = _logits(seen, rows, rule, oracle)
                    exact, estimate, near, far = logits
                    divergence += float(forward_divergence(exact, estimate, near | far).sum())
                    heads += len(seen.names) * rows.numel()
                    _add_tokens(tokens, logits, seen, rule)
                    _add_blocks(blocks, logits, seen, rule)
        tasks = fitting_tasks(base.tokenizer, corpus, length)
        for number in range(samples if tasks else 0):
            ids, rows = question(base.tokenizer, corpus, length, seed, number, tasks)
            for seen in capture_heads(base.model, ids):
                logits = _logits(seen, rows.to(base.model.device), rule, oracle)
                _add_tokens(answers, logits, seen, rule)
        curves = {"tokens": tokens, "answer_tokens": answers, "blocks": blocks}
        found[str(length)] = {
            "divergence": divergence / heads,
            **{
                name: {str(recall): curve.cost_at(recall) for recall in RECALLS}
                for name, curve in curves.items()
            },
            "at_p": dict(zip(map(str, TOP_P), tokens.points(), strict=True)),
            "answers_at_p": dict(zip(map(str, TOP_P), answers.points(), strict=False)),
        }
    return found


def prose(
    tokenizer: PreTrainedTokenizerBase, corpus: TextCorpus, length: int, seed: int, number: int
) -> list[int]:
    """A window of prose."""
    start, rng = begin_ids(tokenizer), random.Random(f"index-{length}-{seed}-{number}")
    return [*start, *corpus.sample_tokens(tokenizer, length - len(start), rng)]


def question(
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    length: int,
    seed: int,
    number: int,
    tasks: Sequence[str],
) -> tuple[list[int], Tensor]:
    """A prompt with its answer, of every task in turn, and the rows that write the answer."""
    task = tasks[number % len(tasks)]
    [example] = make_examples(tokenizer, corpus, length, number, seed + 1, [task]).values()
    ids = [*example.prompt_ids, *example.answer_ids]
    return ids, torch.arange(len(example.prompt_ids) - 1, len(ids) - 1)


def tiles(length: int, rule: AttentionRule, device: torch.device) -> Iterator[Tensor]:
    """Rows of some tiles, evenly over the second half."""
    size = min(rule.query_block_size, length // 8)
    first = torch.linspace(length // 2, length - size, TILES).long().tolist()
    for start in first:
        yield torch.arange(start, start + size, device=device)


Logits = tuple[Tensor, Tensor, Tensor, Tensor]


def _logits(seen: CapturedHeads, rows: Tensor, rule: AttentionRule, oracle: bool) -> Logits:
    exact, estimate, near, far = query_logits(seen, rows, rule)
    exact = exact.masked_fill(~(near | far), -torch.inf)
    return exact, exact if oracle else estimate, near, far


def _add_tokens(curve: Curve, logits: Logits, seen: CapturedHeads, rule: AttentionRule) -> None:
    """Each row its own tokens, for every p."""
    curve.add(*swept_top_p(rule, *logits), len(seen.names) * logits[0].shape[2])


def _add_blocks(curve: Curve, logits: Logits, seen: CapturedHeads, rule: AttentionRule) -> None:
    """One list a tile, for every share that puts a block on it; the cost is a share of the far keys."""
    curve.add(*swept_row_share(rule, *logits, seen.positions), len(seen.names) * logits[0].shape[2])


def swept_top_p(
    rule: AttentionRule, exact: Tensor, estimate: Tensor, near: Tensor, far: Tensor
) -> tuple[list[float], list[float]]:
    """What `select_per_query` keeps and reads at every p, by one sort.

    Args:
        rule: the reading.
        exact: logits [1, heads, rows, keys], minus infinity at keys not visible.
        estimate: likewise.
        near: bool, broadcastable to them.
        far: likewise.

    Returns:
        For each of `TOP_P` the attention mass on near and selected keys, and the far keys selected,
        both summed over rows and heads.
    """
    true, mass = masses(exact), masses(estimate)
    by_p = [target_mass(replace(rule, top_p=top_p), mass, near, far) for top_p in TOP_P]
    descending, order = by_p[0][0].sort(dim=-1, descending=True, stable=True)
    reached_before = descending.cumsum(-1) - descending
    far_in_order = far.expand(true.shape).gather(-1, order) & (descending > 0)
    true_in_order = true.gather(-1, order) * far_in_order
    near_mass = float((true * near).sum())
    kept, read = [], []
    for _, target in by_p:
        taken = reached_before < target[..., None]
        kept.append(near_mass + float((true_in_order * taken).sum()))
        read.append(float((far_in_order & taken).sum()))
    return kept, read


def swept_row_share(
    rule: AttentionRule,
    exact: Tensor,
    estimate: Tensor,
    near: Tensor,
    far: Tensor,
    key_positions: Tensor,
) -> tuple[list[float], list[float]]:
    """What `select_per_query_block` keeps and reads at every share, for rows that are one tile.

    Args:
        rule: block size.
        exact: as in `swept_top_p`, like the next three.
        estimate: likewise.
        near: likewise.
        far: likewise.
        key_positions: int64 [1, keys].

    Returns:
        For each of `ROW_SHARES` the attention mass on near and listed keys, and the share of the far
        keys that is listed, both summed over rows and heads.
    """
    true, blocks = masses(exact), block_ids(key_positions, rule.block_size)
    estimated, held, keys = (
        sum_blocks(part, blocks)
        for part in (masses(estimate) * far, true * far, far.expand(true.shape).float())
    )
    keys = keys / keys.sum(-1, keepdim=True).clamp(min=1)
    strongest = estimated.amax(2, keepdim=True)
    near_mass = float((true * near).sum())
    kept, read = [], []
    for share in ROW_SHARES:
        listed = strongest >= share
        kept.append(near_mass + float((held * listed).sum()))
        read.append(float((keys * listed).sum()))
    return kept, read
