"""Top-p for each layer: far keys are read where dropped mass changes the answers.

The same dropped mass costs most layers nothing and a few layers almost everything (docs/experiment-log.md). For each
layer with retrieval heads, the divergence from dense retrieval heads and the share of far keys read are measured for
several values of p at answers, while all other layers read everything. The values that minimise the sum of the
divergences are then chosen, with as many far keys read as with one p. The answers are those of the tasks on which the
selection of Qwen2.5-Coder-1.5B loses accuracy: counting, which needs nearly the whole attention mass, and one key among
hundreds that look alike, for which another layer is decisive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.calibration.answer_sequences import AnswerSequences, Sequences, answer_positions
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.texts import Prose
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layer import SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.ops import SelectionStatistics
from rtpurbo.settings import CalibrationSettings, Progress, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOP_P = (0.6, 0.75, 0.95, 0.98)
"""Values that are measured in addition to the rule's own."""

SHARES = {"counting": 0.5, "lookup": 0.5}
"""Kinds of sequences at whose answers costs are measured."""


@dataclass(frozen=True)
class Cost:
    """Cost of a value of p in one layer.

    Attributes:
        divergence: from dense retrieval heads, in nats per token of the answers.
        share_read: share of the far keys that the layer reads.
    """

    divergence: float
    share_read: float


Costs = Mapping[int, Mapping[float, Cost]]
"""Costs by layer and value of p."""

CostRows = list[list[Sequence[float]]]
"""Costs of each sequence, in plain types: layer, value of p, divergence, share of the far keys read."""


@dataclass(frozen=True)
class LayerTopP:
    """Chosen values of p.

    Attributes:
        values: by layer of the model; None for layers that are not converted.
        share_read: mean share of the far keys that retrieval heads read with one p; with `values` at most this.
        divergence_of_one: sum of the layers' divergences with one p, in nats per token of the answers.
        divergence: the same with `values`.
        costs: of every measured value.
    """

    values: tuple[float | None, ...]
    share_read: float
    divergence_of_one: float
    divergence: float
    costs: Costs


Answer = Callable[[], Tensor]
"""Function that returns the log-probabilities of the answers' tokens, fp32 [tokens, vocabulary]."""


def find_layer_top_p(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    settings: CalibrationSettings,
    *,
    seed: int = 0,
    measured: CostRows | None = None,
    store: Callable[[CostRows], None] | None = None,
    progress: Progress = no_progress,
) -> LayerTopP | None:
    """Chooses p for each layer, with as many far keys read as with the rule's one `top_p`.

    None without retrieval heads, or without a sequence that is long enough for a question.

    Args:
        model: sparse, with trained indexers.
        tokenizer: the model's.
        corpus: prose.
        settings: `length` and `top_p_sequences`.
        seed: of the sequences.
        measured: costs of the first sequences, if an earlier run was interrupted.
        store: called with the costs of all sequences so far, after each.
        progress: called after each sequence.

    Raises:
        RTPurboError: the corpus is too short.
    """
    config = model.rtpurbo_config
    rule, heads = config.attention, config.head_map.retrieval_heads
    # Other sequences than those of the gates.
    sequences = AnswerSequences(tokenizer, corpus, (settings.length,), seed + 1, SHARES)
    values = sorted({*TOP_P, rule.top_p})
    costs = measure_costs(
        model,
        sequences,
        settings.top_p_sequences,
        values=values,
        measured=measured,
        store=store,
        progress=progress,
    )
    if not costs:
        return None
    weights = {layer: len(heads[layer]) for layer in costs}
    one = dict.fromkeys(costs, rule.top_p)
    share_read = mean_share_read(costs, weights, one)
    chosen = choose_top_p(costs, weights, share_read)
    return LayerTopP(
        tuple(None if each is None else chosen.get(n, rule.top_p) for n, each in enumerate(heads)),
        share_read,
        _divergence(costs, one),
        _divergence(costs, chosen),
        costs,
    )


def _divergence(costs: Costs, chosen: Mapping[int, float]) -> float:
    return sum(costs[layer][top_p].divergence for layer, top_p in chosen.items())


def measure_costs(
    model: PreTrainedModel,
    sequences: Sequences,
    count: int,
    *,
    values: Sequence[float] = TOP_P,
    measured: CostRows | None = None,
    store: Callable[[CostRows], None] | None = None,
    progress: Progress = no_progress,
) -> dict[int, dict[float, Cost]]:
    """Measures every value of p in every layer with retrieval heads.

    Args:
        model: sparse, with trained indexers.
        sequences: longer than sinks and window.
        count: number of sequences, of which those without an answer are skipped; without any answer there are no costs.
        values: values of p below 1.
        measured: costs of the first sequences, if they are known.
        store: called with the costs of all sequences so far, after each.
        progress: called after each sequence.
    """
    layers = [layer for layer in headwise_modules(model) if layer.retrieval_heads]
    rows = list(measured or ())
    for number in range(len(rows), count if layers else 0):
        conversation = sequences.sequence(number)
        rows.append([])
        if conversation.answer_spans:
            with _answering(model, conversation) as answer:
                dense = answer()
                for layer in layers:
                    for top_p in values:
                        rows[-1].append(
                            (layer.layer_idx, top_p, *_cost(layer, top_p, dense, answer))
                        )
        if store is not None:
            store(rows)
        progress("top-p", number + 1, count, {})
    found: dict[tuple[int, float], list[Cost]] = {}
    for layer_idx, top_p, divergence, share_read in chain.from_iterable(rows):
        found.setdefault((int(layer_idx), top_p), []).append(Cost(divergence, share_read))
    return {
        layer.layer_idx: {
            top_p: Cost(
                fmean(cost.divergence for cost in found[layer.layer_idx, top_p]),
                fmean(cost.share_read for cost in found[layer.layer_idx, top_p]),
            )
            for top_p in values
        }
        for layer in layers
        if found
    }


@contextmanager
def _answering(model: PreTrainedModel, conversation: Conversation) -> Iterator[Answer]:
    """Yields an `Answer` whose queries select for themselves, as in decode steps; all layers read everything.

    The text before the first answer is read once; later questions are read with the answers.
    """
    positions = torch.tensor(answer_positions(conversation), device=model.device)
    first, last = int(positions[0]), int(positions[-1])
    ids = torch.tensor([conversation.input_ids[: last + 1]], device=model.device)
    cache = HeadwiseCache(model)

    def answer() -> Tensor:
        # A copy, because recurrent layers and layers with windows of their own cannot take tokens back.
        logits = model(ids[:, first:], **{CACHE_NAME: deepcopy(cache)}, use_cache=True).logits[0]
        return logits[positions - first].float().log_softmax(-1)

    with torch.no_grad(), runtime(model).rule(top_p=1.0):
        model(ids[:, :first], **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        with runtime(model).rule(prefill_mode="top_p"):
            yield answer


def _cost(
    layer: SparseAttention, top_p: float, dense: Tensor, answer: Answer
) -> tuple[float, float]:
    """Returns the divergence with a value of p in one layer, and the share of the far keys that it reads."""
    statistics = SelectionStatistics()
    before = layer.rule, layer.statistics
    layer.rule, layer.statistics = replace(layer.rule, top_p=top_p), statistics
    try:
        found = answer()
    finally:
        layer.rule, layer.statistics = before
    divergence = (dense.exp() * (dense - found)).sum(-1).mean().item()
    return max(0.0, divergence), statistics.share_read or 0.0


def mean_share_read(
    costs: Costs, weights: Mapping[int, float], chosen: Mapping[int, float]
) -> float:
    """Returns the mean share of far keys that retrieval heads read with the chosen values."""
    return sum(weights[n] * costs[n][top_p].share_read for n, top_p in chosen.items()) / sum(
        weights[n] for n in chosen
    )


def choose_top_p(costs: Costs, weights: Mapping[int, float], share_read: float) -> dict[int, float]:
    """Chooses p for each layer: the smallest sum of divergences within a mean share of far keys read.

    Starts at the smallest values and raises, step by step, the layer that loses the most divergence per far key read.

    Args:
        costs: from `measure_costs`.
        weights: number of retrieval heads of each layer.
        share_read: mean over retrieval heads of the share of far keys that may be read.
    """
    chosen = {layer: min(by_value) for layer, by_value in costs.items()}
    while True:
        best: tuple[float, int, float] | None = None
        for layer, current in chosen.items():
            for value, cost in costs[layer].items():
                raised = {**chosen, layer: value}
                if value <= current or mean_share_read(costs, weights, raised) > share_read:
                    continue
                gain = costs[layer][current].divergence - cost.divergence
                price = weights[layer] * (cost.share_read - costs[layer][current].share_read)
                rate = gain / max(price, 1e-9)
                if gain > 0 and (best is None or rate > best[0]):
                    best = rate, layer, value
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
