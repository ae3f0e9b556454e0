"""Stage 2: distils the dense model into the sparse one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus
from rtpurbo.lengths import check_context
from rtpurbo.models.architecture import context_length
from rtpurbo.models.sparsify import runtime
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import DistillationSettings, Progress, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop
from rtpurbo.training.lora_scale import HeldOut, choose_scale, draw_held_out, losses_by_scale
from rtpurbo.training.sequences import Pools, TrainingMix, TrainingSequence
from rtpurbo.training.source import SequenceSource, Texts, random_access
from rtpurbo.training.student import check_trainable, save_student, trainable, trained_weights
from rtpurbo.training.teacher import TeacherCache, TeacherTargets, states_at, top_logits_divergence
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
    processes: Processes = SINGLE_PROCESS,
    pools: Pools | None = None,
) -> dict[str, Any]:
    """Trains the sparse model with its own dense attention as teacher, and writes the weights into `output_dir`.

    The model itself keeps its base weights; `rtpurbo.models.artifact.apply_stage2` applies the written ones.

    Args:
        model: sparse, with trained indexers if the selection is on in training.
        tokenizer: the model's.
        corpus: training text, in memory or streamed.
        held_out: text of the sequences on which the LoRA scale is chosen.
        output_dir: existing folder; receives a PEFT adapter or full weights.
        settings: steps, lengths, LoRA.
        teacher_folder: folder of the teacher's targets.
        seed: seed of data and LoRA.
        log: receives losses.
        checkpoint: restored at the start and saved regularly.
        progress: called after each step.
        processes: processes that train; each gets an equal part of the sequences of a step, and the main one writes.
        pools: sequences written by the dense model, for the tasks `conversations` and `documents`;
            some of them are held out.

    Returns:
        `lora_scale` and `losses_by_scale` if the scale was to be found, else an empty dictionary. At a scale of 0
        nothing is written, because the model is better without stage 2.

    Raises:
        RTPurboError: sequences do not fit the model's context, a pool is missing, full weights are in half
            precision, or a loss or gradient is not finite.
        StoppedBySignalError: the process received a signal, and a checkpoint was saved.
    """
    settings = (settings or DistillationSettings()).resolved(processes.count)
    check_trainable(model.dtype, settings)
    check_context("sequences", max(settings.lengths), context_length(model.config))
    written, unseen_written = (pools or Pools()).split()
    mix = TrainingMix.of(settings, tokenizer, random_access(corpus), seed, "stage2", written)
    source = SequenceSource(mix, corpus, settings.per_step, processes)
    targets = TeacherCache(teacher_folder, source, settings, seed)
    with runtime(model).dense(), autocast(model):
        for step in range(settings.steps):
            targets.fill(model, step)
            progress("teacher", step + 1, settings.steps, {})
        unseen_targets: HeldOut = {}
        if settings.lora_scale is None:
            unseen = TrainingMix.of(
                settings, tokenizer, held_out, seed, "stage2-held-out", unseen_written
            )
            unseen_targets = draw_held_out(model, unseen, settings)

    with (
        trainable(model, settings, seed) as student,
        runtime(model).rule(prefill_mode=settings.prefill_mode),
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
                    sequence, target = targets.read(number)
                    result = backpropagate(model, number, sequence, target, settings)
                    results.append(result)
                figures = loop.update(step, results)
                loop.report(step, {name: round(value, 6) for name, value in figures.items()})
        scale, found = settings.lora_scale, dict[str, Any]()
        if scale is None:
            loss = partial(loss_on, model, settings=settings)
            losses = losses_by_scale(student, unseen_targets, loss, progress)
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
    """Computes the loss of a sequence inside `trainable` and adds its gradients to those of the weights.

    Returns:
        Mean divergence over all targets, and over those in answers if there are any.
    """
    answers = targets.answers
    targets = targets.to(model.device)
    # Includes the backward pass, which recomputes layers: the same queries have to select again.
    with runtime(model).decoding_last(num_selecting_queries(sequence, settings)):
        divergence = top_logits_divergence(predictions(model, sequence, targets), targets)
        loss, figures = loss_of(divergence, answers, settings)
        loss.backward()
    return SequenceResult(number, sequence.input_ids, divergence.detach().mean(), figures)


def loss_on(
    model: PreTrainedModel,
    sequence: TrainingSequence,
    targets: TeacherTargets,
    settings: DistillationSettings,
) -> Tensor:
    """Returns the loss of a sequence."""
    with runtime(model).decoding_last(num_selecting_queries(sequence, settings)):
        moved = targets.to(model.device)
        student = predictions(model, sequence, moved)
    return loss_of(top_logits_divergence(student, moved), targets.answers, settings)[0]


def predictions(
    model: PreTrainedModel,
    sequence: TrainingSequence,
    targets: TeacherTargets,
    first_position: int = 0,
) -> Tensor:
    """Returns log-probabilities of the teacher's tokens at each target position: [targets, tokens].

    `first_position` is that of the sequence's first token, as of `states_at`.
    """
    with autocast(model):
        states = states_at(model, sequence.input_ids, targets.positions, first_position)
        return log_probabilities(states, model.get_output_embeddings(), targets.token_ids)


def num_selecting_queries(sequence: TrainingSequence, settings: DistillationSettings) -> int:
    """Number of a sequence's last queries that select: those that predict its answer, or the last of prose."""
    return min(settings.decode_queries, sequence.num_answer_tokens or settings.decode_queries)


def loss_of(
    divergence: Tensor, answers: Tensor, settings: DistillationSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean loss over all targets plus the weighted mean over those in answers.

    Args:
        divergence: [targets].
        answers: bool [targets], on the CPU to avoid a device synchronisation.
        settings: `answer_weight`.

    Returns:
        The loss, and `answer_loss` if there are answers.
    """
    loss = divergence.mean()
    if not answers.any():
        return loss, {}
    answer_loss = divergence[answers.to(divergence.device)].mean()
    return loss + settings.answer_weight * answer_loss, {"answer_loss": answer_loss.detach()}


def autocast(model: PreTrainedModel) -> Any:
    """Returns the autocast of stage 2: bf16 on a GPU, none elsewhere."""
    return torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")
