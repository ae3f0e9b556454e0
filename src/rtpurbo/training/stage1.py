"""Stage 1: the token indexers learn which far tokens their heads attend to, on a frozen model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import AttentionRule
from rtpurbo.data.texts import TextCorpus
from rtpurbo.lengths import check_stage1_lengths
from rtpurbo.models.architecture import context_length
from rtpurbo.models.sharding import is_sharded
from rtpurbo.models.sparse_layers import headwise_modules, indexers_in_float32
from rtpurbo.processes import ALONE, Processes
from rtpurbo.settings import IndexerTrainingSettings, Progress, no_progress
from rtpurbo.training.backpropagation import backpropagate
from rtpurbo.training.capture import CapturedHeads, capture_heads
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.layerwise import train_as_layers_pass
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop
from rtpurbo.training.packing import choose_rows
from rtpurbo.training.pools import Pools
from rtpurbo.training.probe import Probe
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.source import SequenceSource, Texts, random_access
from rtpurbo.training.start import start_indexers

LOGGED = {
    "recall": "recall",
    "answer_recall": "answer_recall",
    "tokens": "tokens_read",
    "oracle_tokens": "oracle_tokens",
}
"""Figures of a probe that are logged, and their names in the log."""


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
    pools: Pools | None = None,
) -> dict[str, Any]:
    """Trains every indexer of a sparse model by forward KL, all retrieval heads of all layers at once.

    Memory is O(length): the model runs over a sequence once, the retrieval heads' states are kept, and each of the
    next `steps_per_sequence` steps scores query rows against all keys. With a single step a sequence nothing is
    kept: a layer's indexers learn as it passes, and the sequences of a step are packed.

    Args:
        model: sparse; everything but the indexers stays as it is. Of a model that each process loaded a part of,
            all processes run every layer together.
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
        pools: sequences that the dense model wrote, for the task `documents`; some of them are held out.

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
    check_stage1_lengths(settings, context_length(model.config), rule)
    indexers_in_float32(model)
    parameters = {
        f"layers.{module.layer_idx}.indexer.{name}": weight
        for module in modules
        for name, weight in module.indexer.named_parameters()
    }

    written, unseen_written = (pools or Pools()).split()
    mix = TrainingMix.of(settings, tokenizer, random_access(corpus), seed, stage, written)
    per_step = settings.sequences_per_step or processes.count
    source = SequenceSource(mix, corpus, per_step, processes)
    probe_mix = replace(mix, corpus=held_out, purpose=f"{stage}-probe", pools=unseen_written)
    probe = Probe(
        model,
        [probe_mix.sequence(number) for number in range(settings.probe_sequences)],
        on_student=on_student,
        keep=keeps_states(settings),
    )
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
        starts = [mix.sequence(number).input_ids for number in range(settings.init_sequences)]
        start_indexers(model, settings.init, starts, seed=seed)

    figures = probe.measure()
    captured: list[list[CapturedHeads]] | None = None
    for weight in parameters.values():
        weight.requires_grad_(True)
    with loop.steps(first) as steps:
        for step in steps:
            group, turn = divmod(step, settings.steps_per_sequence)
            numbers, sequences = source.numbers(group), source.take(group)
            seeds = [_row_seed(stage, seed, step, number % per_step) for number in numbers]
            if not keeps_states(settings):
                losses = train_as_layers_pass(
                    model,
                    sequences,
                    settings,
                    seeds,
                    on_student=on_student,
                    packed=not is_sharded(model),
                )
            else:
                if turn == 0 or captured is None:
                    captured = None  # before the next ones exist
                    group_steps = range(step, step + settings.steps_per_sequence - turn)
                    captured = [
                        capture_heads(
                            model,
                            sequence.input_ids,
                            dense=not on_student,
                            rows=_rows_of_steps(
                                sequence,
                                rule,
                                settings,
                                [
                                    _row_seed(stage, seed, each, number % per_step)
                                    for each in group_steps
                                ],
                            ).to(model.device),
                        )
                        for number, sequence in zip(numbers, sequences, strict=True)
                    ]
                losses = [
                    _step(heads, sequence, rule, settings, row_seed)
                    for heads, sequence, row_seed in zip(captured, sequences, seeds, strict=True)
                ]
            results = [
                SequenceResult(number, sequence.input_ids, loss)
                for number, sequence, loss in zip(numbers, sequences, losses, strict=True)
            ]
            entry = {"loss": round(loop.update(step, results)["loss"], 6)}
            if (step + 1) % settings.probe_every == 0 or step + 1 == settings.steps:
                figures = probe.measure()
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


def keeps_states(settings: IndexerTrainingSettings) -> bool:
    """Whether further steps need the states of a sequence."""
    return settings.steps_per_sequence > 1


def _row_seed(stage: str, seed: int, step: int, place: int) -> str:
    """Of the choice of rows; that of the first sequence of a step has always been without a place."""
    return f"{stage}-{seed}-{step}" + (f"-{place}" if place else "")


def _rows_of_steps(
    sequence: TrainingSequence,
    rule: AttentionRule,
    settings: IndexerTrainingSettings,
    seeds: list[str],
) -> Tensor:
    """All rows that the steps on one sequence will learn from, ascending."""
    rows = [choose_rows([sequence], rule, settings, [seed], "cpu").rows for seed in seeds]
    return torch.cat(rows).unique()


def _step(
    heads: list[CapturedHeads],
    sequence: TrainingSequence,
    rule: AttentionRule,
    settings: IndexerTrainingSettings,
    seed: str,
) -> Tensor:
    """Backpropagates one step; the loss is the mean over all heads, the gradient that of their sum."""
    choice = choose_rows([sequence], rule, settings, [seed], heads[0].queries.device)
    total = torch.stack([backpropagate(seen, choice, rule) for seen in heads]).sum()
    return total / sum(len(seen.names) for seen in heads)
