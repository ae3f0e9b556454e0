"""Stage 1: the token indexers learn which far tokens their heads attend to, on a frozen model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import AttentionRule
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparsify import headwise_modules
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.settings import IndexerTrainingSettings, Progress, check_context, no_progress
from rtpurbo.training.capture import CapturedHeads, capture_heads
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.indexer_loss import indexer_loss, rows_with_far_keys, selection_quality
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.optimizer import make_optimizer
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.start import start_indexers

PROBE_ROWS = 128
LOGGED = ("recall", "answer_recall", "tokens", "oracle_tokens")

Captured = tuple[list[CapturedHeads], Tensor]
"""States of a sequence, and its rows that answer a question."""


def train_indexers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    held_out: TextCorpus,
    settings: IndexerTrainingSettings | None = None,
    *,
    seed: int = 0,
    stage: str = "stage1",
    on_student: bool = False,
    log: TrainingLog | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Trains every indexer of a sparse model by forward KL, all retrieval heads of all layers at once.

    Memory is O(length): the model runs over a sequence once, the retrieval heads' states are kept, and each of the
    next `steps_per_sequence` steps scores a few query rows against all keys.

    Args:
        model: sparse; everything but the indexers stays as it is.
        tokenizer: the model's.
        corpus: training text.
        held_out: text of the probe.
        settings: lengths, steps, learning rate, start.
        seed: of data and rows.
        stage: name in the log.
        on_student: learn from the sparse model itself, starting from the indexers it has (the refresh after stage 2).
        log: where losses go.
        checkpoint: where to continue from and save to.
        progress: told after each step.

    Returns:
        The last probe's figures: recall, tokens, oracle_tokens and divergence, each a mean over
        heads; answer_recall, of rows that answer a question; and `by_head`.

    Raises:
        RTPurboError: no head retrieves, or sequences leave nothing to select.
    """
    settings = settings or IndexerTrainingSettings()
    log = log or TrainingLog(None)
    checkpoint = checkpoint or Checkpoint(None)
    rule: AttentionRule = model.rtpurbo_config.attention
    modules = [module for module in headwise_modules(model) if module.retrieval_heads]
    if not modules:
        return {}
    _check_lengths(model, settings, rule)
    parameters = [weight for module in modules for weight in module.indexer.parameters()]

    mix = TrainingMix(tokenizer, corpus, settings.lengths, settings.needle_share, seed, stage)
    probe_mix = replace(mix, corpus=held_out, purpose=f"{stage}-probe")
    probes = [
        _capture(model, probe_mix.sequence(number), on_student)
        for number in range(settings.probe_sequences)
    ]
    optimizer, schedule = make_optimizer(
        parameters,
        settings.learning_rate,
        settings.weight_decay,
        settings.warmup_steps,
        settings.steps,
    )
    first = checkpoint.restore(parameters, optimizer, schedule)
    if first == 0 and not on_student:
        starts = [mix.sequence(number).input_ids for number in range(settings.start_sequences)]
        start_indexers(model, settings.start, starts, seed=seed)

    figures = _probe(probes, rule)
    captured: Captured | None = None
    for weight in parameters:
        weight.requires_grad_(True)
    for step in range(first, settings.steps):
        number, turn = divmod(step, settings.steps_per_sequence)
        if turn == 0 or captured is None:
            captured = _capture(model, mix.sequence(number), on_student)
        loss = _step(captured, rule, settings, f"{stage}-{seed}-{step}")
        if not torch.isfinite(loss):
            raise RTPurboError(
                f"{stage} diverged at step {step} (loss {float(loss)}): lower the learning rate."
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        entry: dict[str, Any] = {"stage": stage, "step": step + 1, "loss": round(float(loss), 6)}
        if (step + 1) % settings.probe_every == 0 or step + 1 == settings.steps:
            figures = _probe(probes, rule)
            entry.update({name: round(figures[name], 4) for name in LOGGED if name in figures})
        log.write(entry)
        checkpoint.save(step + 1, parameters, optimizer, schedule)
        progress(
            stage, step + 1, settings.steps, {"loss": float(loss), "recall": figures["recall"]}
        )
    for weight in parameters:
        weight.requires_grad_(False)
    return figures


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
