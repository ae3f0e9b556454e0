"""Stage 2: the sparse model learns to say what the dense one says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.files import save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.artifact import ADAPTER_FOLDER, FULL_WEIGHTS_FILE
from rtpurbo.models.families import family_of
from rtpurbo.models.sparsify import decoding_last, running_dense, using_rule
from rtpurbo.processes import ALONE, Processes
from rtpurbo.settings import DistillationSettings, Progress, check_context, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.sharding import own_part, restore_weights, shard, whole
from rtpurbo.training.source import SequenceSource, Texts, random_access
from rtpurbo.training.teacher import (
    TeacherCache,
    TeacherTargets,
    label_logits,
    top_logits_divergence,
)

MAX_GRADIENT_NORM = 1.0


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Texts,
    output_dir: Path,
    settings: DistillationSettings | None = None,
    *,
    teacher_folder: Path,
    seed: int = 0,
    log: TrainingLog | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> None:
    """Trains the sparse model against itself run dense, and writes the weights of stage 2 into `output_dir`.

    The model comes back with its base weights; `rtpurbo.models.artifact.apply_stage2` applies what was written.
    Several processes that share by FSDP leave the model divided among them: load it anew for that.

    Args:
        model: sparse, with trained indexers if the selection is on in training.
        tokenizer: the model's.
        corpus: training text, in memory or streamed.
        output_dir: an open folder; gets a PEFT adapter or full weights.
        settings: steps, lengths, LoRA.
        teacher_folder: where the teacher's targets are kept.
        seed: of data and LoRA.
        log: where losses go.
        checkpoint: where to continue from and save to.
        progress: told after each step.
        processes: who trains; each takes its share of every step's sequences, and the main one writes.

    Raises:
        RTPurboError: sequences do not fit the model's context, or a loss or gradient is not finite.
        StoppedBySignalError: a signal came; a checkpoint was saved.
    """
    settings = settings or DistillationSettings()
    check_context("sequences", max(settings.lengths), model.config.max_position_embeddings)
    mix = TrainingMix(
        tokenizer,
        random_access(corpus),
        settings.lengths,
        settings.needle_share,
        seed,
        "stage2",
        settings.variable_share,
        settings.passage_share,
    )
    per_step = settings.sequences_per_step or processes.count
    source = SequenceSource(mix, corpus, per_step, processes)
    targets = TeacherCache(
        teacher_folder, source, seed, settings.labels_per_sequence, settings.top_logits
    )
    with running_dense(model), _autocast(model):
        for step in range(settings.steps):
            targets.fill(model, step)
            progress("teacher", step + 1, settings.steps, {})

    with (
        trainable(model, settings, seed, processes) as student,
        using_rule(model, prefill_mode=settings.prefill_mode),
    ):
        loop = StageLoop(
            "stage2",
            {name: weight for name, weight in student.named_parameters() if weight.requires_grad},
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
                    result = _backpropagate(model, number, sequence, label, settings)
                    results.append(result)
                figures = loop.update(step, results)
                loop.report(step, {name: round(value, 6) for name, value in figures.items()})
        _save(student, output_dir, processes)


def _backpropagate(
    model: PreTrainedModel,
    number: int,
    sequence: TrainingSequence,
    targets: TeacherTargets,
    settings: DistillationSettings,
) -> SequenceResult:
    """Adds a sequence's gradients to the weights'; its loss is the mean over all labels."""
    targets = targets.to(model.device)
    decode_rows = min(settings.decode_rows, sequence.num_answer_tokens or settings.decode_rows)
    with _autocast(model), decoding_last(model, decode_rows):
        logits = label_logits(model, sequence.input_ids, targets.positions)
    divergence = top_logits_divergence(logits, targets)
    loss = divergence.mean()
    if sequence.num_answer_tokens:
        loss = loss + settings.answer_weight * divergence[targets.answers].mean()
    loss.backward()
    divergence = divergence.detach()
    figures = (
        {"answer_loss": divergence[targets.answers].mean()} if sequence.num_answer_tokens else {}
    )
    return SequenceResult(number, sequence.input_ids, divergence.mean(), figures)


@contextmanager
def trainable(
    model: PreTrainedModel, settings: DistillationSettings, seed: int, processes: Processes = ALONE
) -> Iterator[PreTrainedModel | PeftModel]:
    """The model ready to be trained; its base weights and modules come back afterwards."""
    checkpointing = settings.gradient_checkpointing and model.device.type == "cuda"
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student: PreTrainedModel | PeftModel = model
    before: dict[str, torch.Tensor] = {}
    if settings.lora_rank:
        family = family_of(model.config)
        names = family.attention_projections + (
            family.other_projections if settings.lora_beyond_attention else ()
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            student = get_peft_model(
                model,
                LoraConfig(
                    r=settings.lora_rank,
                    lora_alpha=2 * settings.lora_rank,
                    target_modules=list(names),
                    task_type="CAUSAL_LM",
                ),
            )
    else:
        for name, weight in model.named_parameters():
            if ".indexer." not in name:
                weight.requires_grad_(True)
    shard(model, processes)
    if not settings.lora_rank:
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                before[name] = own_part(weight.detach()).cpu().clone()
    model.train()
    try:
        yield student
    finally:
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_disable()
        if isinstance(student, PeftModel):
            student.unload()
        restore_weights(model, before)
        model.requires_grad_(False)


def _save(student: PreTrainedModel | PeftModel, folder: Path, processes: Processes) -> None:
    """Writes what stage 2 trained: LoRA in bf16 (its rounding is far below its effect), full weights as they are."""
    if not isinstance(student, PeftModel):
        # Gathered on all processes, kept where they are written.
        weights = {}
        for name, weight in student.named_parameters():
            if ".indexer." not in name:
                gathered = whole(weight.detach())
                if processes.is_main:
                    weights[name] = gathered.cpu()
        if processes.is_main:
            save_tensors_atomically(folder / FULL_WEIGHTS_FILE, weights)
        return
    adapter = {name: whole(weight) for name, weight in get_peft_model_state_dict(student).items()}
    if not processes.is_main:
        return
    with whole_folder(folder / ADAPTER_FOLDER, overwrite=True) as temporary:
        student.peft_config["default"].save_pretrained(str(temporary))
        # The artifact says which base model it belongs to; a path of one machine would not. PEFT
        # keeps the modules' names in a set, whose order changes from run to run.
        described = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        described["base_model_name_or_path"] = None
        described["inference_mode"] = True
        described["target_modules"] = sorted(described["target_modules"])
        write_json_atomically(temporary / "adapter_config.json", described)
        save_tensors_atomically(
            temporary / "adapter_model.safetensors",
            {name: weight.bfloat16() for name, weight in adapter.items()},
        )


def _autocast(model: PreTrainedModel) -> Any:
    return torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")
