"""A small model that does long-range tasks well, so that what a sparse version loses can be seen.

    python experiments/sharp_teacher.py --data books.jsonl.gz --output sharp-8k
    python experiments/sharp_teacher.py --data books.jsonl.gz --output sharp-32k --steps 467 \
        --extend 32768 --rope-theta 1e6

Trains SmolLM2-135M-Instruct on books, needles, chains of variables and quoted
passages (`rtpurbo.data.long_range`): the kinds of tasks that it is tested on, with other books, words
and names. Writes a transformers folder that any command of rtpurbo takes as a model, then the share
of right answers. A run that was cut off goes on from its last checkpoint; a finished one is only
tested.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from long_tasks import SCORING, TASKS, is_predicted, make_examples
from teacher_training import TeacherSettings, make_teacher

from rtpurbo.data.texts import load_texts
from rtpurbo.devices import resolve_device
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.base import load_base_model

REPORT_EVERY = 25


def settings_of(arguments: argparse.Namespace, context: int) -> TeacherSettings:
    """The settings of a training that ends with a context of so many tokens."""
    longest = arguments.length or context
    return TeacherSettings(
        steps=arguments.steps,
        lengths=(longest // 4, longest, longest // 2, longest),
        context=context,
        rope_theta=arguments.rope_theta,
        learning_rate=arguments.learning_rate,
        lora_rank=arguments.lora_rank,
        tokens=arguments.tokens,
        tokens_at_once=arguments.tokens_at_once,
        labels=arguments.labels,
        gradient_checkpointing=arguments.gradient_checkpointing,
        checkpoint_every=arguments.checkpoint_every,
        seed=arguments.seed,
    )


def say_progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
    """A line every so many steps."""
    if done % REPORT_EVERY == 0 or done == total:
        shown = ", ".join(f"{name} {value:,.3f}" for name, value in figures.items())
        print(f"{stage}: step {done} of {total}: {shown}", flush=True)


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
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--extend", type=int, help="a longer context, in tokens")
    parser.add_argument("--rope-theta", type=float, help="another base of the rotary embedding")
    parser.add_argument("--length", type=int, help="longest sequence; the context if left out")
    parser.add_argument("--tokens", type=int, default=65536, help="of an optimiser step")
    parser.add_argument("--tokens-at-once", type=int, default=32768, help="of a forward")
    parser.add_argument("--labels", type=int, default=4096, help="random label tokens of a step")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="needs less memory")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--samples", type=int, default=16, help="questions a task in the test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, help="seconds, after which to stop cleanly")
    arguments = parser.parse_args()

    device = resolve_device(arguments.device)
    output = Path(arguments.output)
    try:
        with stopping_cleanly(arguments.time_limit):
            if output.is_dir():
                print(f"{output} is there already: training is skipped", flush=True)
            else:
                base = load_base_model(arguments.model, device=device)
                context = arguments.extend or base.model.config.max_position_embeddings
                settings = settings_of(arguments, context)
                prose = load_texts(arguments.data, "train")
                make_teacher(base, prose, settings, output, arguments.workers, say_progress)
                del base
            if arguments.samples:
                check_teacher(arguments, device)
    except StoppedBySignalError:
        print("stopped: the same command goes on from here", flush=True)


if __name__ == "__main__":
    main()
