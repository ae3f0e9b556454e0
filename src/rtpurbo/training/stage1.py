"""Stage 1: trains the token indexers to predict the attention of their heads, on a frozen model."""

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
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import IndexerTrainingSettings, Progress, no_progress
from rtpurbo.training.capture import CapturedHeads, capture_heads
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.indexer_init import init_indexers
from rtpurbo.training.layerwise import backpropagate, train_layer_by_layer
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop
from rtpurbo.training.packing import choose_queries
from rtpurbo.training.probe import Probe
from rtpurbo.training.sequences import Pools, TrainingMix, TrainingSequence
from rtpurbo.training.source import SequenceSource, Texts, random_access

LOGGED = {
    "recall": "recall",
    "answer_recall": "answer_recall",
    "tokens": "tokens_read",
    "oracle_tokens": "oracle_tokens",
}
"""Names in the log of the probe's figures."""


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
    processes: Processes = SINGLE_PROCESS,
    pools: Pools | None = None,
) -> dict[str, Any]:
    """Trains the indexers of all retrieval heads of all layers by forward KL against the heads' attention.

    Memory is O(length): the model runs over a sequence once, the states of the retrieval heads are kept, and each
    of the next `steps_per_sequence` steps scores some queries against all keys. With one step per sequence no states
    are kept: each layer is trained during the forward pass, and the sequences of a step are packed.

    Args:
        model: sparse; only the indexers change. If each process loaded a part of the model, all processes run every
            layer together.
        tokenizer: the model's.
        corpus: training text, in memory or streamed.
        held_out: text of the probe.
        settings: lengths, steps, learning rate, initialisation.
        seed: seed of data and queries.
        stage: name in the log.
        on_student: train on the sparse model's own states, starting from its present indexers (the refresh after
            stage 2).
        log: receives losses.
        checkpoint: restored at the start and saved regularly.
        progress: called after each step.
        processes: processes that train; each gets an equal part of the sequences of a step.
        pools: sequences written by the dense model, for the task `documents`; some of them are held out.

    Returns:
        Figures of the last probe: recall, tokens, oracle_tokens and divergence, each a mean over heads; answer_recall,
        of queries that predict an answer; and `by_head`. Empty if no head retrieves.

    Raises:
        RTPurboError: sequences have no far tokens to select, or a loss or gradient is not finite.
        StoppedBySignalError: the process received a signal, and a checkpoint was saved.
    """
    settings = (settings or IndexerTrainingSettings()).resolved(processes.count)
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
    source = SequenceSource(mix, corpus, settings.per_step, processes)
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
        samples = [mix.sequence(number).input_ids for number in range(settings.init_sequences)]
        init_indexers(model, samples)

    def seed_of(step: int, number: int) -> str:
        """Seed of a choice of queries; the first sequence of a step has no suffix."""
        place = number % settings.per_step
        return f"{stage}-{seed}-{step}" + (f"-{place}" if place else "")

    figures = probe.measure()
    captured: list[list[CapturedHeads]] | None = None
    for weight in parameters.values():
        weight.requires_grad_(True)
    with loop.steps(first) as steps:
        for step in steps:
            group, turn = divmod(step, settings.steps_per_sequence)
            numbers, sequences = source.numbers(group), source.take(group)
            seeds = [seed_of(step, number) for number in numbers]
            if not keeps_states(settings):
                losses = train_layer_by_layer(
                    model,
                    sequences,
                    settings,
                    seeds,
                    on_student=on_student,
                    packed=not is_sharded(model),
                )
            else:
                if turn == 0 or captured is None:
                    captured = None  # frees the old states before new ones are captured
                    group_steps = range(step, step + settings.steps_per_sequence - turn)
                    captured = [
                        _capture(
                            model,
                            sequence,
                            settings,
                            [seed_of(each, number) for each in group_steps],
                            on_student,
                        )
                        for number, sequence in zip(numbers, sequences, strict=True)
                    ]
                losses = [
                    _step(heads, sequence, rule, settings, query_seed)
                    for heads, sequence, query_seed in zip(captured, sequences, seeds, strict=True)
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
    """True if several steps use the states of one sequence."""
    return settings.steps_per_sequence > 1


def _capture(
    model: PreTrainedModel,
    sequence: TrainingSequence,
    settings: IndexerTrainingSettings,
    seeds: list[str],
    on_student: bool,
) -> list[CapturedHeads]:
    """States of a sequence, with all queries that the steps with these seeds will train on."""
    rule = model.rtpurbo_config.attention
    chosen = [choose_queries([sequence], rule, settings, [seed], model.device) for seed in seeds]
    positions = torch.cat([choice.positions for choice in chosen]).unique()
    return capture_heads(model, sequence.input_ids, dense=not on_student, query_positions=positions)


def _step(
    heads: list[CapturedHeads],
    sequence: TrainingSequence,
    rule: AttentionRule,
    settings: IndexerTrainingSettings,
    seed: str,
) -> Tensor:
    """Backpropagates one step; returns the mean loss over all heads, while gradients are those of the sum."""
    choice = choose_queries([sequence], rule, settings, [seed], heads[0].queries.device)
    total = torch.stack([backpropagate(seen, choice, rule) for seen in heads]).sum()
    return total / sum(len(seen.names) for seen in heads)
