"""A small model that does long-range tasks well, so that what a sparse version loses can be seen.

    python experiments/sharp_teacher.py --data books.jsonl.gz --output sharp-8k
    python experiments/sharp_teacher.py --data books.jsonl.gz --output sharp-32k --steps 467 \
        --extend 32768 --rope-theta 1e6

Trains all weights of SmolLM2-135M-Instruct on books, needles, chains of variables and quoted
passages (`rtpurbo.data.long_range`): the kinds of tasks that it is tested on, with other books, words
and names. Writes a transformers folder that any command of rtpurbo takes as a model, then the share
of right answers. A run that was cut off goes on from its last checkpoint; a finished one is only
tested.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from long_tasks import SCORING, TASKS, is_predicted, make_examples
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from rtpurbo.data.long_range import LongRangeMix
from rtpurbo.data.texts import load_texts
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.files import whole_folder, write_json_atomically
from rtpurbo.models.base import load_base_model
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.optimizer import make_optimizer

WARMUP_STEPS = 20
WEIGHT_DECAY = 0.01
REPORT_EVERY = 25
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Batches(Dataset[dict[str, Any]]):
    """Makes batches by number: sequences of one length, and the places in them to learn from.

    Attributes:
        mix: draws the sequences.
        lengths: tokens of a sequence; batches take them in turn.
        tokens: of a batch.
        labels: random tokens of a batch to predict, beside all those of answers.
    """

    mix: LongRangeMix
    lengths: tuple[int, ...]
    tokens: int
    labels: int

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Token ids, row by row, and which places of the flattened batch predict what is learnt.

        Shorter sequences are filled up at their end, where no other token can see it.
        """
        length = self.lengths[number % len(self.lengths)]
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


def prepared(batches: Batches, numbers: range, workers: int) -> Iterator[dict[str, Any]]:
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


def losses(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean loss of the random labels and of the answers' tokens (0 without any); no other logits are made."""
    ids = torch.tensor(batch["ids"]).to(model.device, non_blocking=True)
    places = torch.tensor([*batch["labels"], *batch["answers"]]).to(model.device, non_blocking=True)
    on_gpu = model.device.type == "cuda"
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=on_gpu)
    with autocast, sdpa_kernel(FASTEST_FIRST, set_priority=True) if on_gpu else nullcontext():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = model.get_output_embeddings()(hidden[places])
    each = F.cross_entropy(logits.float(), ids.flatten()[places + 1], reduction="none")
    general, answers = each.split([len(batch["labels"]), len(batch["answers"])])
    return general.mean(), answers.sum() / max(1, len(answers))


def train(model: PreTrainedModel, batches: Batches, arguments: argparse.Namespace) -> list[Any]:
    """Trains every weight in place and returns the losses, step by step."""
    model.requires_grad_(True).train()
    parameters = list(model.parameters())
    optimizer, schedule = make_optimizer(
        parameters, arguments.learning_rate, WEIGHT_DECAY, WARMUP_STEPS, arguments.steps
    )
    checkpoint = Checkpoint(
        Path(arguments.output + ".checkpoint"), arguments.checkpoint_every or arguments.steps + 1
    )
    first = checkpoint.restore(parameters, optimizer, schedule)
    parts = max(1, arguments.tokens // batches.tokens)
    curve: list[list[float]] = []
    recent: list[Tensor] = []
    numbers = range(first * parts, arguments.steps * parts)
    began = time.time()
    stream = prepared(batches, numbers, arguments.workers)
    for step in range(first, arguments.steps):
        sums = torch.zeros(2, device=model.device)
        for _ in range(parts):
            general, answers = losses(model, next(stream))
            ((general + answers) / parts).backward()
            sums += torch.stack([general.detach(), answers.detach()]) / parts
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(sums)
        checkpoint.save(step + 1, parameters, optimizer, schedule)
        # Reading a figure waits for the GPU, so it is not done at every step.
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == arguments.steps:
            values = torch.stack(recent).mean(0).tolist()
            curve.append([step + 1, *(round(value, 4) for value in values)])
            recent.clear()
            print(
                f"step {step + 1} of {arguments.steps}: loss {values[0]:.3f}, answers "
                f"{values[1]:.3f} ({time.time() - began:.0f} s)",
                flush=True,
            )
    model.eval().requires_grad_(False)
    return curve


def change_context(model: PreTrainedModel, context: int, theta: float | None) -> None:
    """Sets the longest context and the base of the rotary embedding, in place."""
    config = model.config
    config.max_position_embeddings = context
    if theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(config=config).to(model.device)


def make_teacher(arguments: argparse.Namespace, device: torch.device) -> None:
    """Trains the teacher and writes its folder, whole or not at all."""
    began = time.time()
    base = load_base_model(arguments.model, device=device)
    print(f"model loaded ({time.time() - began:.0f} s)", flush=True)
    context = arguments.extend or base.model.config.max_position_embeddings
    change_context(base.model, context, arguments.rope_theta)
    longest = arguments.length or context
    lengths = (longest // 4, longest, longest // 2, longest)
    tokens = max(longest, arguments.tokens_at_once)
    parts = max(1, arguments.tokens // tokens)
    mix = LongRangeMix(base.tokenizer, load_texts(arguments.data, "train"), arguments.seed)
    batches = Batches(mix, lengths, tokens, arguments.labels // parts)
    curve = train(base.model, batches, arguments)
    with whole_folder(arguments.output) as folder:
        base.model.to(torch.bfloat16).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        write_json_atomically(
            folder / "training.json",
            {
                "base_model": base.reference.name.rsplit("/", 1)[-1],
                "device": device_name(device),
                "lengths": lengths,
                "steps": arguments.steps,
                "tokens_a_step": parts * tokens,
                "learning_rate": arguments.learning_rate,
                "seed": arguments.seed,
                "losses (step, all, answers)": curve,
            },
        )
    shutil.rmtree(arguments.output + ".checkpoint", ignore_errors=True)


def check_teacher(arguments: argparse.Namespace, device: torch.device) -> None:
    """Prints the share of right answers at full length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = load_base_model(arguments.output, device=device, dtype=dtype)
    held_out = load_texts(arguments.data, "heldout")
    length = arguments.length or base.model.config.max_position_embeddings
    right = dict.fromkeys(TASKS, 0)
    for number in range(arguments.samples):
        for task, example in make_examples(base.tokenizer, held_out, length, number).items():
            right[task] += is_predicted(base.model, example)
    print(SCORING)
    for task, count in right.items():
        print(f"{task:10s} {count} of {arguments.samples} at {length:,} tokens")


def main() -> None:
    """Trains unless the folder is there, then tests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder or name; the default base model if left out")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", required=True, help="the teacher's folder")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--extend", type=int, help="a longer context, in tokens")
    parser.add_argument("--rope-theta", type=float, help="another base of the rotary embedding")
    parser.add_argument("--length", type=int, help="longest sequence; the context if left out")
    parser.add_argument("--tokens", type=int, default=65536, help="of an optimiser step")
    parser.add_argument("--tokens-at-once", type=int, default=32768, help="of a forward")
    parser.add_argument("--labels", type=int, default=4096, help="random label tokens of a step")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0 for never")
    parser.add_argument("--samples", type=int, default=16, help="questions a task in the test")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    device = resolve_device(arguments.device)
    if Path(arguments.output).is_dir():
        print(f"{arguments.output} is there already: training is skipped", flush=True)
    else:
        make_teacher(arguments, device)
    if arguments.samples:
        check_teacher(arguments, device)


if __name__ == "__main__":
    main()
