"""Stage 2: the sparse model learns to say what the dense one says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.artifact import ADAPTER_FOLDER, FULL_WEIGHTS_FILE
from rtpurbo.models.families import family_of
from rtpurbo.models.sparsify import decoding_last, running_dense, using_rule
from rtpurbo.settings import DistillationSettings, Progress, check_context, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.optimizer import make_optimizer
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.training.teacher import TeacherCache, label_logits, top_logits_divergence


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    output_dir: Path,
    settings: DistillationSettings | None = None,
    *,
    teacher_folder: Path,
    seed: int = 0,
    log: TrainingLog | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
) -> None:
    """Trains the sparse model against itself run dense, and writes the weights of stage 2 into `output_dir`.

    The model comes back with its base weights; `rtpurbo.models.artifact.apply_stage2` applies what was written.

    Args:
        model: sparse, with trained indexers if the selection is on in training.
        tokenizer: the model's.
        corpus: training text.
        output_dir: an open folder; gets a PEFT adapter or full weights.
        settings: steps, lengths, LoRA.
        teacher_folder: where the teacher's targets are kept.
        seed: of data and LoRA.
        log: where losses go.
        checkpoint: where to continue from and save to.
        progress: told after each step.

    Raises:
        RTPurboError: sequences do not fit the model's context, or the loss is not finite.
    """
    settings = settings or DistillationSettings()
    log = log or TrainingLog(None)
    checkpoint = checkpoint or Checkpoint(None)
    check_context("sequences", max(settings.lengths), model.config.max_position_embeddings)
    mix = TrainingMix(tokenizer, corpus, settings.lengths, settings.needle_share, seed, "stage2")
    targets = TeacherCache(teacher_folder, mix, settings.labels_per_sequence, settings.top_logits)
    with running_dense(model), _autocast(model):
        for number in range(settings.steps):
            targets.fill(model, number)
            progress("teacher", number + 1, settings.steps, {})

    with (
        trainable(model, settings, seed) as student,
        using_rule(model, prefill_mode=settings.prefill_mode),
    ):
        parameters = [weight for weight in student.parameters() if weight.requires_grad]
        optimizer, schedule = make_optimizer(
            parameters,
            settings.learning_rate,
            settings.weight_decay,
            settings.warmup_steps,
            settings.steps,
        )
        first = checkpoint.restore(parameters, optimizer, schedule)
        for step in range(first, settings.steps):
            sequence, label = mix.sequence(step), targets.read(step).to(model.device)
            decode_rows = min(
                settings.decode_rows, sequence.num_answer_tokens or settings.decode_rows
            )
            with _autocast(model), decoding_last(model, decode_rows):
                logits = label_logits(model, sequence.input_ids, label.positions)
            divergence = top_logits_divergence(logits, label)
            loss = divergence.mean()
            if sequence.num_answer_tokens:
                loss = loss + settings.answer_weight * divergence[label.answers].mean()
            if not torch.isfinite(loss):
                raise RTPurboError(
                    f"stage 2 diverged at step {step} (loss {float(loss)}): lower the learning rate."
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(divergence.detach().mean())
            entry: dict[str, Any] = {"stage": "stage2", "step": step + 1, "loss": round(value, 6)}
            if sequence.num_answer_tokens:
                entry["answer_loss"] = round(float(divergence.detach()[label.answers].mean()), 6)
            log.write(entry)
            checkpoint.save(step + 1, parameters, optimizer, schedule)
            progress("stage2", step + 1, settings.steps, {"loss": value})
        _save(student, output_dir)


@contextmanager
def trainable(
    model: PreTrainedModel, settings: DistillationSettings, seed: int
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
                before[name] = weight.detach().cpu().clone()
                weight.requires_grad_(True)
    model.train()
    try:
        yield student
    finally:
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_disable()
        if isinstance(student, PeftModel):
            student.unload()
        for name, weight in model.named_parameters():
            if name in before:
                weight.data.copy_(before[name])
        model.requires_grad_(False)


def _save(student: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Writes what stage 2 trained: LoRA in bf16 (its rounding is far below its effect), full weights as they are."""
    if not isinstance(student, PeftModel):
        weights = {
            name: weight for name, weight in student.named_parameters() if ".indexer." not in name
        }
        save_tensors_atomically(folder / FULL_WEIGHTS_FILE, weights)
        return
    with whole_folder(folder / ADAPTER_FOLDER, overwrite=True) as temporary:
        student.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)
        # The artifact says which base model it belongs to; a path of one machine would not. PEFT
        # keeps the modules' names in a set, whose order changes from run to run.
        described = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        described["base_model_name_or_path"] = None
        described["target_modules"] = sorted(described["target_modules"])
        write_json_atomically(temporary / "adapter_config.json", described)
        path = temporary / "adapter_model.safetensors"
        save_tensors_atomically(
            path, {name: weight.bfloat16() for name, weight in load_file(path).items()}
        )


def _autocast(model: PreTrainedModel) -> Any:
    return torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")
