"""Training of a small model on the long-range sequences of `rtpurbo.data.long_range`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from rtpurbo.data.long_range import LongRangeMix
from rtpurbo.data.texts import TextCorpus
from rtpurbo.devices import device_name
from rtpurbo.files import whole_folder, write_json_atomically
from rtpurbo.models.base import BaseModel
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import Progress, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop

STAGE = "teacher"
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of the training of a teacher.

    Attributes:
        steps: optimiser steps.
        lengths: tokens of a sequence; steps take them in turn.
        context: the model's longest context afterwards, in tokens; None leaves it.
        rope_theta: base of the rotary embedding; None leaves it.
        learning_rate: peak of AdamW's, after warm-up, before cosine decay.
        lora_rank: rank of a LoRA on all linear layers of the decoder, trained together with the norms
            and merged in the end; 0 trains all weights.
        embeddings: train the embeddings too, where all weights are trained.
        tokens: of an optimiser step; with several processes at least a forward of each.
        tokens_at_once: of a forward; at least the longest sequence.
        labels: random label tokens of a step, beside all those of answers.
        gradient_checkpointing: run layers again for the gradients, all but their attention: less memory,
            and little more time where sequences are long.
        weight_decay: AdamW's.
        warmup_steps: linear warm-up.
        checkpoint_every: steps between two checkpoints.
        seed: of the data.
    """

    steps: int
    lengths: tuple[int, ...]
    context: int | None = None
    rope_theta: float | None = None
    learning_rate: float = 3e-4
    lora_rank: int = 0
    embeddings: bool = True
    tokens: int = 65536
    tokens_at_once: int = 32768
    labels: int = 4096
    gradient_checkpointing: bool = False
    weight_decay: float = 0.01
    warmup_steps: int = 20
    checkpoint_every: int = 50
    seed: int = 0

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward."""
        return max(*self.lengths, self.tokens_at_once)

    @property
    def batches_per_step(self) -> int:
        """Forwards of an optimiser step of one process alone."""
        return max(1, self.tokens // self.batch_tokens)


@dataclass(frozen=True)
class Batches(Dataset[dict[str, Any]]):
    """Makes batches by number: sequences of one length, and the places in them to learn from.

    Attributes:
        mix: draws the sequences.
        lengths: tokens of a sequence; steps take them in turn.
        tokens: of a batch.
        labels: random tokens of a batch to predict, beside all those of answers.
        per_step: batches of a step, all of one length, so that processes that share them finish together.
    """

    mix: LongRangeMix
    lengths: tuple[int, ...]
    tokens: int
    labels: int
    per_step: int = 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Token ids, row by row, and which places of the flattened batch predict what is learnt.

        Shorter sequences are filled up at their end, where no other token can see it.
        """
        length = self.lengths[number // self.per_step % len(self.lengths)]
        rows: list[list[int]] = []
        answers: list[int] = []
        others: list[int] = []
        for row in range(max(1, self.tokens // length)):
            sequence = self.mix.sequence(1000 * number + row, length)
            offset = row * length
            for start, end in sequence.answer_spans:
                answers += range(offset + start - 1, offset + end - 1)
            others += range(offset, offset + len(sequence) - 1)
            rows.append(sequence.input_ids + [0] * (length - len(sequence)))
        chosen = random.Random(f"labels-{self.mix.seed}-{number}").sample(
            others, min(self.labels, len(others))
        )
        return {"ids": rows, "labels": chosen, "answers": answers}


def prepared(batches: Batches, numbers: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """The batches of these numbers in order, made ahead by other processes if there are workers."""
    # Forked workers begin at once; spawned ones took two minutes to load and unpack everything.
    context = "fork" if workers else None
    return iter(
        DataLoader(
            batches,
            sampler=numbers,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            multiprocessing_context=context,
        )
    )


def as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """Lists stay lists."""
    return batch


def fastest_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, PyTorch takes the fastest kernel; layers that are run again take the same one."""
    if model.device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(FASTEST_FIRST, set_priority=True)


def losses(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean loss of the random labels and of the answers' tokens (0 without any); no other logits are made."""
    ids = torch.tensor(batch["ids"]).to(model.device, non_blocking=True)
    places = torch.tensor([*batch["labels"], *batch["answers"]]).to(model.device, non_blocking=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = model.get_output_embeddings()(hidden[places])
    each = F.cross_entropy(logits.float(), ids.flatten()[places + 1], reduction="none")
    general, answers = each.split([len(batch["labels"]), len(batch["answers"])])
    return general.mean(), answers.sum() / max(1, len(answers))


def keep_attention(
    _context: object, operation: object, *_: object, **__: object
) -> CheckpointPolicy:
    """Running a layer again costs little but for its attention, whose output is small."""
    kept = operation in ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def trainable(
    model: PreTrainedModel,
    settings: TeacherSettings,
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Trained parameters by name; at the end they are merged into the model's weights.

    Args:
        model: dense.
        settings: all weights or a LoRA, and whether layers are run again for the gradients.
        start: what a LoRA begins from, by the names of the matrices: [out, rank] and [rank, in], whose
            product is added to the model's; at zero if None.
    """
    student: PeftModel | None = None
    if settings.lora_rank:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            adapter = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            student = get_peft_model(model, adapter)
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.requires_grad_(True)
        for name, (up, down) in (start or {}).items():
            layer = student.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
            with torch.no_grad():
                layer.lora_B["default"].weight.copy_(up)
                layer.lora_A["default"].weight.copy_(down)
    else:
        model.requires_grad_(True)
        model.get_input_embeddings().requires_grad_(settings.embeddings)
        model.get_output_embeddings().requires_grad_(settings.embeddings)
    model.train()
    if settings.gradient_checkpointing:
        contexts = partial(create_selective_checkpoint_contexts, keep_attention)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    # Under autocast, a LoRA's input in the precision of its weights would only be cast back.
    on_gpu = model.device.type == "cuda"
    with disable_input_dtype_casting(model, active=on_gpu):
        yield {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    if student is not None:
        student.merge_and_unload()
    model.eval().requires_grad_(False)


def print_progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
    """Prints a line every 25 steps and after the last."""
    if done % 25 == 0 or done == total:
        shown = ", ".join(f"{name} {value:,.3f}" for name, value in figures.items())
        print(f"{stage}: step {done} of {total}: {shown}", flush=True)


def train(
    model: PreTrainedModel,
    batches: Batches,
    settings: TeacherSettings,
    work: Path,
    workers: int = 0,
    progress: Progress = no_progress,
    processes: Processes = SINGLE_PROCESS,
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> TrainingLog:
    """Trains in place, from the last checkpoint on.

    Args:
        model: dense.
        batches: what it learns from.
        settings: of the training.
        work: folder of checkpoints and log.
        workers: processes that make batches.
        progress: told after each step.
        processes: who trains; each takes its share of a step's batches.
        start: what a LoRA begins from, as in `trainable`.

    Returns:
        The log, with the mean losses of every step.

    Raises:
        RTPurboError: a loss or gradient is not finite.
        StoppedBySignalError: a signal came or the time was over; a checkpoint was saved.
    """
    work.mkdir(parents=True, exist_ok=True)
    log = TrainingLog(work / "training_log.jsonl" if processes.is_main else None)
    parts = batches.per_step // processes.count
    with trainable(model, settings, start) as weights, fastest_attention(model):
        loop = StageLoop(
            STAGE,
            weights,
            settings,
            figures=("answer_loss",),
            max_norm=1.0,
            log=log,
            checkpoint=Checkpoint(work, settings.checkpoint_every, keep=1, processes=processes),
            progress=progress,
            processes=processes,
        )
        first = loop.restore()
        log.rewind(STAGE, first)
        numbers = range(
            first * batches.per_step + processes.index,
            settings.steps * batches.per_step,
            processes.count,
        )
        stream = prepared(batches, numbers, workers)
        with loop.steps(first) as steps:
            for step in steps:
                results = []
                for part in range(parts):
                    number, batch = numbers[(step - first) * parts + part], next(stream)
                    general, answers = losses(model, batch)
                    (general + answers).backward()
                    tokens = [token for row in batch["ids"] for token in row]
                    figures = {"answer_loss": answers.detach()} if batch["answers"] else {}
                    results.append(SequenceResult(number, tokens, general.detach(), figures))
                loop.report(step, loop.update(step, results))
    return log


def change_context(model: PreTrainedModel, context: int, theta: float | None) -> None:
    """Sets the longest context and the base of the rotary embedding, in place."""
    config = model.config
    config.max_position_embeddings = context
    if theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(config=config).to(model.device)


def make_teacher(
    base: BaseModel,
    prose: TextCorpus,
    settings: TeacherSettings,
    output: Path,
    workers: int = 0,
    progress: Progress = no_progress,
    processes: Processes = SINGLE_PROCESS,
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Trains a teacher and writes its folder, whole or not at all.

    Args:
        base: what to start from; changed in place.
        prose: books to train on.
        settings: of the training.
        output: the folder; checkpoints lie beside it until it is there.
        workers: processes that make batches.
        progress: told after each step.
        processes: who trains.
        start: what a LoRA begins from, as in `trainable`.

    Raises:
        RTPurboError: a loss or gradient is not finite.
        StoppedBySignalError: a signal came or the time was over; the same call continues.
    """
    model, device = base.model, base.model.device
    change_context(
        model, settings.context or model.config.max_position_embeddings, settings.rope_theta
    )
    # As many for each process, and at least one.
    per_step = processes.count * max(1, settings.batches_per_step // processes.count)
    batches = Batches(
        LongRangeMix(base.tokenizer, prose, settings.seed),
        settings.lengths,
        settings.batch_tokens,
        settings.labels // per_step,
        per_step,
    )
    work = output.with_name(output.name + ".work")
    log = train(model, batches, settings, work, workers, progress, processes, start)
    if not processes.is_main:
        return
    with whole_folder(output) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        shutil.copy(log.path, folder)
        write_json_atomically(
            folder / "training.json",
            {
                "base_model": base.reference.name.rsplit("/", 1)[-1],
                "device": device_name(device),
                **asdict(settings),
            },
        )
    shutil.rmtree(work, ignore_errors=True)
