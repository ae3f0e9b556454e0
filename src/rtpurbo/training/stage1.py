"""Stage 1: the token indexers learn which far tokens their heads attend to, on a frozen model."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import AttentionRule
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparsify import headwise_modules
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.processes import ALONE, Processes
from rtpurbo.settings import IndexerTrainingSettings, Progress, check_context, no_progress
from rtpurbo.training.capture import CapturedHeads, capture_heads
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.indexer_loss import indexer_loss, rows_with_far_keys, selection_quality
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.sharding import shard
from rtpurbo.training.source import SequenceSource, Texts, random_access
from rtpurbo.training.start import start_indexers

PROBE_ROWS = 128
LOGGED = {
    "recall": "recall",
    "answer_recall": "answer_recall",
    "tokens": "tokens_read",
    "oracle_tokens": "oracle_tokens",
}
"""Figures of a probe that are logged, and their names in the log."""

Captured = tuple[list[CapturedHeads], Tensor]
"""States of a sequence, and its rows that answer a question."""


def train_indexers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Texts,
    held_out: TextCorpus,
    settings: IndexerTrainingSettings | None = None,
    *,
    seed: int = 0,
    stage: str = "stage1",
    on_student: bool = False,
    log: TrainingLog | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Trains every indexer of a sparse model by forward KL, all retrieval heads of all layers at once.

    Memory is O(length): the model runs over a sequence once, the retrieval heads' states are kept, and each of the
    next `steps_per_sequence` steps scores a few query rows against all keys.

    Args:
        model: sparse; everything but the indexers stays as it is, but several processes that share by FSDP leave
            it divided among them.
        tokenizer: the model's.
        corpus: training text, in memory or streamed.
        held_out: text of the probe.
        settings: lengths, steps, learning rate, start.
        seed: of data and rows.
        stage: name in the log.
        on_student: learn from the sparse model itself, starting from the indexers it has (the refresh after stage 2).
        log: where losses go.
        checkpoint: where to continue from and save to.
        progress: told after each step.
        processes: who trains; each takes its share of every step's sequences.

    Returns:
        The last probe's figures: recall, tokens, oracle_tokens and divergence, each a mean over
        heads; answer_recall, of rows that answer a question; and `by_head`.

    Raises:
        RTPurboError: no head retrieves, sequences leave nothing to select, or a loss or gradient is not finite.
        StoppedBySignalError: a signal came; a checkpoint was saved.
    """
    settings = settings or IndexerTrainingSettings()
    rule: AttentionRule = model.rtpurbo_config.attention
    modules = [module for module in headwise_modules(model) if module.retrieval_heads]
    if not modules:
        return {}
    _check_lengths(model, settings, rule)
    parameters = {
        f"layers.{module.layer_idx}.indexer.{name}": weight
        for module in modules
        for name, weight in module.indexer.named_parameters()
    }

    mix = TrainingMix(
        tokenizer,
        random_access(corpus),
        settings.lengths,
        settings.needle_share,
        seed,
        stage,
        settings.variable_share,
        settings.passage_share,
    )
    per_step = settings.sequences_per_step or processes.count
    source = SequenceSource(mix, corpus, per_step, processes)
    probe_mix = replace(mix, corpus=held_out, purpose=f"{stage}-probe")
    probes = [
        _capture(model, probe_mix.sequence(number), on_student)
        for number in range(settings.probe_sequences)
    ]
    loop = StageLoop(
        stage,
        parameters,
        settings,
        log=log,
        checkpoint=checkpoint,
        progress=progress,
        processes=processes,
    )
    first = loop.restore()
    source.seek(loop.checkpoint.position)
    if first == 0 and not on_student:
        starts = [mix.sequence(number).input_ids for number in range(settings.start_sequences)]
        start_indexers(model, settings.start, starts, seed=seed)
    shard(model, processes)

    figures = _probe(probes, rule)
    captured: list[Captured] | None = None
    for weight in parameters.values():
        weight.requires_grad_(True)
    with loop.steps(first) as steps:
        for step in steps:
            group, turn = divmod(step, settings.steps_per_sequence)
            sequences = source.take(group)
            if turn == 0 or captured is None:
                captured = [_capture(model, sequence, on_student) for sequence in sequences]
            results = [
                SequenceResult(
                    number,
                    sequence.input_ids,
                    _step(states, rule, settings, _row_seed(stage, seed, step, number % per_step)),
                )
                for number, sequence, states in zip(
                    source.numbers(group), sequences, captured, strict=True
                )
            ]
            entry = {"loss": round(loop.update(step, results)["loss"], 6)}
            if (step + 1) % settings.probe_every == 0 or step + 1 == settings.steps:
                figures = _probe(probes, rule)
                entry |= {
                    LOGGED[name]: round(figures[name], 4) for name in LOGGED if name in figures
                }
            next_group = (step + 1) // settings.steps_per_sequence
            loop.report(
                step,
                entry,
                shown={
                    "loss": entry["loss"],
                    "recall": figures["recall"],
                    "tokens_read": figures["tokens"],
                },
                position=partial(source.position_of_all, next_group),
            )
    for weight in parameters.values():
        weight.requires_grad_(False)
    return figures


def _row_seed(stage: str, seed: int, step: int, place: int) -> str:
    """Of the choice of rows; that of the first sequence of a step has always been without a place."""
    return f"{stage}-{seed}-{step}" + (f"-{place}" if place else "")


def _capture(model: PreTrainedModel, sequence: TrainingSequence, on_student: bool) -> Captured:
    heads = capture_heads(model, sequence.input_ids, dense=not on_student)
    last = len(sequence.input_ids) - 1
    return heads, torch.arange(last - sequence.num_answer_tokens, last, device=model.device)


def _step(
    captured: Captured, rule: AttentionRule, settings: IndexerTrainingSettings, seed: str
) -> Tensor:
    """Backpropagates one step; the loss is the mean over all heads, the gradient that of their sum.

    Rows that answer a question are one in hundreds, but they are what retrieval is for: a random
    choice would hardly ever meet them, so they are learnt from at every step.
    """
    heads, answer_rows = captured
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(56))
    rows = rows_with_far_keys(heads[0], rule)
    if settings.rows_per_step is not None and settings.rows_per_step < rows.numel():
        chosen = torch.randperm(rows.numel(), generator=generator)[: settings.rows_per_step]
        rows = rows[chosen.to(rows.device)]
    total = _backpropagate(heads, rows, rule, 1.0)
    if answer_rows.numel():
        _backpropagate(heads, answer_rows, rule, settings.answer_weight)
    return total / sum(len(seen.names) for seen in heads)


def _backpropagate(
    heads: list[CapturedHeads], rows: Tensor, rule: AttentionRule, weight: float
) -> Tensor:
    """Adds to the gradients; returns the loss, mean over rows and sum over heads."""
    total = torch.zeros((), device=rows.device)
    for seen in heads:
        # A few rows at a time bound the memory; their gradients add up.
        for chunk in query_chunks(rows.numel(), len(seen.names) * seen.keys.shape[2]):
            part = rows[chunk]
            loss = indexer_loss(seen, part, rule).sum() * (part.numel() / rows.numel())
            (weight * loss).backward()
            total += loss.detach()
    return total


@torch.no_grad()
def _probe(probes: list[Captured], rule: AttentionRule) -> dict[str, Any]:
    """Selection quality on held-out text, mean over sequences, rows and heads; and for each head."""
    by_head: dict[str, dict[str, float]] = {}
    names = ("recall", "tokens", "oracle_tokens", "divergence")
    answer_recalls = []
    for heads, answer_rows in probes:
        for seen in heads:
            rows = rows_with_far_keys(seen, rule)
            rows = rows[:: max(1, rows.numel() // PROBE_ROWS)]
            quality = selection_quality(seen, rows, rule)
            values = {name: getattr(quality, name).tolist() for name in names}
            for number, (layer, head) in enumerate(seen.names):
                entry = by_head.setdefault(f"{layer}.{head}", dict.fromkeys(names, 0.0))
                for name in names:
                    entry[name] += values[name][number] / len(probes)
            if answer_rows.numel():
                answer_recalls += selection_quality(seen, answer_rows, rule).recall.tolist()
    figures: dict[str, Any] = {
        name: sum(entry[name] for entry in by_head.values()) / max(1, len(by_head))
        for name in names
    }
    if answer_recalls:
        figures["answer_recall"] = sum(answer_recalls) / len(answer_recalls)
    return {**figures, "by_head": by_head}


def _check_lengths(
    model: PreTrainedModel, settings: IndexerTrainingSettings, rule: AttentionRule
) -> None:
    check_context("sequences", max(settings.lengths), model.config.max_position_embeddings)
    shortest = rule.sliding_window + rule.num_sink_tokens
    if min(settings.lengths) <= shortest:
        raise RTPurboError(
            f"stage 1 needs sequences longer than sinks and window ({shortest} tokens), "
            f"but one length is {min(settings.lengths)}."
        )
