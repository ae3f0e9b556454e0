"""Stage 2: the sparse model learns to say what the dense one says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus
from rtpurbo.models.architecture import context_length
from rtpurbo.models.sparsify import decoding_last, running_dense, using_rule
from rtpurbo.processes import ALONE, Processes
from rtpurbo.settings import DistillationSettings, Progress, check_context, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.labels import label_states
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop
from rtpurbo.training.lora_scale import HeldOut, choose_scale, draw_held_out, losses_by_scale
from rtpurbo.training.pools import Pools
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.source import SequenceSource, Texts, random_access
from rtpurbo.training.student import check_trainable, save_student, trainable, trained_weights
from rtpurbo.training.teacher import TeacherCache, TeacherTargets, top_logits_divergence
from rtpurbo.training.vocabulary import log_probabilities

MAX_GRADIENT_NORM = 1.0


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Texts,
    held_out: TextCorpus,
    output_dir: Path,
    settings: DistillationSettings | None = None,
    *,
    teacher_folder: Path,
    seed: int = 0,
    log: TrainingLog | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
    pools: Pools | None = None,
) -> dict[str, Any]:
    """Trains the sparse model against itself run dense, and writes the weights of stage 2 into `output_dir`.

    The model comes back with its base weights; `rtpurbo.models.artifact.apply_stage2` applies what was written.

    Args:
        model: sparse, with trained indexers if the selection is on in training.
        tokenizer: the model's.
        corpus: training text, in memory or streamed.
        held_out: text of the sequences by which the LoRA scale is found.
        output_dir: an open folder; gets a PEFT adapter or full weights.
        settings: steps, lengths, LoRA.
        teacher_folder: where the teacher's targets are kept.
        seed: of data and LoRA.
        log: where losses go.
        checkpoint: where to continue from and save to.
        progress: told after each step.
        processes: who trains; each takes its share of every step's sequences, and the main one writes.
        pools: sequences that the dense model wrote, for the tasks `conversations` and `documents`;
            some of them are held out.

    Returns:
        `lora_scale` and `losses_by_scale` where the scale was to be found; else nothing. At a scale of 0 nothing is
        written: the model is better off without stage 2.

    Raises:
        RTPurboError: sequences do not fit the model's context, a pool is missing, full weights are in half
            precision, or a loss or gradient is not finite.
        StoppedBySignalError: a signal came; a checkpoint was saved.
    """
    settings = settings or DistillationSettings()
    check_trainable(model.dtype, settings)
    check_context("sequences", max(settings.lengths), context_length(model.config))
    written, unseen_written = (pools or Pools()).split()
    mix = TrainingMix.of(settings, tokenizer, random_access(corpus), seed, "stage2", written)
    per_step = settings.sequences_per_step or processes.count
    source = SequenceSource(mix, corpus, per_step, processes)
    targets = TeacherCache(teacher_folder, source, settings, seed)
    with running_dense(model), autocast(model), targets.writing():
        for step in range(settings.steps):
            targets.fill(model, step)
            progress("teacher", step + 1, settings.steps, {})
        judge: HeldOut = {}
        if settings.lora_scale is None:
            unseen = TrainingMix.of(
                settings, tokenizer, held_out, seed, "stage2-held-out", unseen_written
            )
            judge = draw_held_out(model, unseen, settings)

    with (
        trainable(model, settings, seed) as student,
        using_rule(model, prefill_mode=settings.prefill_mode),
    ):
        loop = StageLoop(
            "stage2",
            trained_weights(student),
            settings,
            figures=("answer_loss",),
            max_norm=MAX_GRADIENT_NORM,
            log=log,
            checkpoint=checkpoint,
            progress=progress,
            processes=processes,
        )
        with loop.steps(loop.restore()) as steps:
            for step in steps:
                results = []
                for number in source.numbers(step):
                    sequence, label = targets.read(number)
                    result = backpropagate(model, number, sequence, label, settings)
                    results.append(result)
                figures = loop.update(step, results)
                loop.report(step, {name: round(value, 6) for name, value in figures.items()})
        scale, found = settings.lora_scale, dict[str, Any]()
        if scale is None:
            loss = partial(loss_on, model, settings=settings)
            losses = losses_by_scale(student, judge, loss, progress)
            scale = processes.from_main(lambda: choose_scale(losses))
            found = {"lora_scale": scale, "losses_by_scale": losses}
        if scale:
            save_student(student, output_dir, processes, scale)
    return found


def backpropagate(
    model: PreTrainedModel,
    number: int,
    sequence: TrainingSequence,
    targets: TeacherTargets,
    settings: DistillationSettings,
) -> SequenceResult:
    """Adds a sequence's gradients to those of the weights.

    Args:
        model: sparse, inside `trainable`.
        number: of the sequence.
        sequence: what the student reads.
        targets: what the teacher says about it.
        settings: weights of the losses, and how many rows select.

    Returns:
        The mean divergence over all labels, and over the answers if there are labels among them.
    """
    answers = targets.answers
    targets = targets.to(model.device)
    token_ids = targets.token_ids
    if settings.cross_entropy_weight:
        following = torch.tensor(sequence.input_ids, device=model.device)[targets.positions + 1]
        token_ids = torch.cat([token_ids, following[:, None]], -1)
    # Around the backward pass too, in which layers are run again: rows have to select as before.
    with decoding_last(model, selecting_rows(sequence, settings)):
        student = predictions(model, sequence, targets, token_ids)
        divergence = top_logits_divergence(student[:, : targets.token_ids.shape[-1]], targets)
        loss, figures = loss_of(divergence, answers, settings)
        if settings.cross_entropy_weight:
            loss = loss - settings.cross_entropy_weight * student[:, -1].mean()
        loss.backward()
    return SequenceResult(number, sequence.input_ids, divergence.detach().mean(), figures)


def loss_on(
    model: PreTrainedModel,
    sequence: TrainingSequence,
    targets: TeacherTargets,
    settings: DistillationSettings,
) -> Tensor:
    """What there would be to learn from a sequence: its loss, without the cross-entropy of labels."""
    with decoding_last(model, selecting_rows(sequence, settings)):
        there = targets.to(model.device)
        student = predictions(model, sequence, there, there.token_ids)
    return loss_of(top_logits_divergence(student, there), targets.answers, settings)[0]


def predictions(
    model: PreTrainedModel, sequence: TrainingSequence, targets: TeacherTargets, token_ids: Tensor
) -> Tensor:
    """The log-probabilities of some tokens at each label: [labels, tokens]."""
    with autocast(model):
        states = label_states(model, sequence.input_ids, targets.positions)
        return log_probabilities(states, model.get_output_embeddings(), token_ids)


def selecting_rows(sequence: TrainingSequence, settings: DistillationSettings) -> int:
    """How many of a sequence's last rows select: those of its answer, or the last of prose."""
    return min(settings.decode_queries, sequence.num_answer_tokens or settings.decode_queries)


def loss_of(
    divergence: Tensor, answers: Tensor, settings: DistillationSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is learnt from labels: their mean, and that of answers beside it.

    Args:
        divergence: [labels].
        answers: bool [labels], on the CPU, so that nothing waits for a device.
        settings: weight of the answers.

    Returns:
        The loss, and `answer_loss` if there are answers.
    """
    loss = divergence.mean()
    if not answers.any():
        return loss, {}
    of_answers = divergence[answers.to(divergence.device)].mean()
    return loss + settings.answer_weight * of_answers, {"answer_loss": of_answers.detach()}


def autocast(model: PreTrainedModel) -> Any:
    """The precision of stage 2: bf16 on a GPU, the weights' own elsewhere."""
    return torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")
