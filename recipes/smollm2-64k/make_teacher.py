"""Extends SmolLM2-135M-Instruct to 65,536 tokens in two stages and tests what it made.

    python recipes/smollm2-64k/make_teacher.py --data books.jsonl.gz --output smollm2-64k --time-limit 570

The same command goes on where it stopped, until the last line says that all is done. What it does and
what it takes: README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from long_tasks import SCORING, TASKS, is_predicted, make_examples
from low_rank import save_difference, with_difference
from sharp_teacher import say_progress
from teacher_training import TeacherSettings, make_teacher

from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.files import whole_folder, write_json_atomically
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.base import load_base_model
from rtpurbo.reporting.formats import short_length
from rtpurbo.reporting.tables import markdown_rows

STAGES = {
    "32k": TeacherSettings(
        steps=400, lengths=(8192, 32768, 16384, 32768), context=32768, rope_theta=1e6
    ),
    "64k": TeacherSettings(
        steps=500,
        lengths=(16384, 65536, 32768, 65536),
        context=65536,
        learning_rate=2e-4,
        gradient_checkpointing=True,
    ),
}
"""Each starts from what the one before it made."""

LENGTHS = (8192, 16384, 32768, 65536)
QUICK_LENGTHS = (1024, 2048)


def quick(settings: TeacherSettings) -> TeacherSettings:
    """The same with a sixteenth of the lengths and a handful of steps, to try the machinery."""
    return replace(
        settings,
        steps=3,
        lengths=tuple(length // 16 for length in settings.lengths),
        tokens=4096,
        tokens_at_once=2048,
        labels=128,
        warmup_steps=1,
        checkpoint_every=1,
    )


def make_stages(
    arguments: argparse.Namespace, stages: dict[str, TeacherSettings], device: torch.device
) -> Path:
    """Makes the stages that are not there yet; returns the last one's folder."""
    prose, model = None, arguments.model
    for name, settings in stages.items():
        folder = arguments.output / name
        if not folder.is_dir():
            prose = prose or load_texts(arguments.data, "train")
            base = load_base_model(model, device=device)
            print(f"stage {name}: {settings.steps} steps, {settings.lengths} tokens", flush=True)
            settings = replace(
                settings,
                seed=arguments.seed,
                lora_rank=arguments.lora_rank,
                learning_rate=arguments.learning_rate or settings.learning_rate,
            )
            make_teacher(base, prose, settings, folder, arguments.workers, say_progress)
        model = str(folder)
    return arguments.output / name


def answers_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: TextCorpus,
    lengths: Sequence[int],
    samples: int,
    path: Path,
) -> dict[str, Any]:
    """Asks what was not asked yet; every answer is kept in a file as soon as it is there."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"right": {}}
    for length in lengths:
        right = found["right"].setdefault(str(length), {task: [] for task in TASKS})
        for number in range(min(map(len, right.values())), samples):
            for task, example in make_examples(tokenizer, held_out, length, number).items():
                if len(right[task]) == number:
                    right[task].append(is_predicted(model, example))
            write_json_atomically(path, {"device": device_name(model.device), **found})
        print(f"{path.stem}: {length:,} tokens done", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Right answers in percent by length and task, and their mean with its 95 % interval."""
    rows = []
    for length, right in found["right"].items():
        every = [100.0 * answer for answers in right.values() for answer in answers]
        low, high = bootstrap_interval(every)
        rows.append(
            [
                short_length(int(length)),
                *(f"{100 * sum(answers) / len(answers):.0f}" for answers in right.values()),
                f"{sum(every) / len(every):.0f} ({low:.0f} to {high:.0f})",
            ]
        )
    return markdown_rows(["tokens", *TASKS, "mean (95 %)"], rows)


def make_all(arguments: argparse.Namespace) -> None:
    """Stages, test, difference, test of the difference."""
    device = resolve_device(arguments.device)
    stages, lengths = STAGES, LENGTHS
    if arguments.quick:
        stages = {name: quick(settings) for name, settings in STAGES.items()}
        lengths = QUICK_LENGTHS
    teacher = make_stages(arguments, stages, device)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    held_out = load_texts(arguments.data, "heldout")
    made = load_base_model(str(teacher), device=device, dtype=dtype)
    tested = {"teacher": made.model}
    for rank in arguments.adapter_rank:
        folder = arguments.output / f"adapter-{rank}"
        base = load_base_model(arguments.model, device=device)
        if not folder.is_dir():
            figures = save_difference(base, made.model, folder, rank)
            print(
                f"{folder}: {figures['bytes'] / 2**20:.1f} MiB, {figures['kept']:.1%} of the squared "
                "difference",
                flush=True,
            )
        tested[folder.name] = with_difference(base, folder).to(dtype)
    print(SCORING, flush=True)
    for name, model in tested.items():
        path = arguments.output / f"answers-{name}.json"
        found = answers_of(model, made.tokenizer, held_out, lengths, arguments.samples, path)
        print(
            f"\n{name}, full attention, questions a cell: {arguments.samples}\n\n{table(found)}\n"
        )
    print(f"all done: {teacher}")


def rebuild(arguments: argparse.Namespace) -> None:
    """Makes a model's folder of an adapter and the base model that it was made for."""
    base = load_base_model(arguments.model)
    model = with_difference(base, arguments.rebuild).to(torch.bfloat16)
    with whole_folder(arguments.output) as folder:
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    print(f"written to {arguments.output}")


def main() -> None:
    """Goes on for as long as it may."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--data", nargs="+", help="books; Python's documentation if left out")
    parser.add_argument("--model", help="folder or name; the default base model if left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, help="seconds, after which to stop cleanly")
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="train a LoRA in each stage, not all weights"
    )
    parser.add_argument("--learning-rate", type=float, help="peak, of both stages")
    parser.add_argument("--adapter-rank", type=int, nargs="*", default=[], help="e.g. 16 64")
    parser.add_argument("--rebuild", type=Path, help="an adapter to make a model's folder of")
    parser.add_argument("--samples", type=int, default=12, help="questions a task and length")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only try the machinery")
    arguments = parser.parse_args()
    try:
        with stopping_cleanly(arguments.time_limit):
            if arguments.rebuild:
                rebuild(arguments)
            else:
                make_all(arguments)
    except StoppedBySignalError:
        print("stopped: the same command goes on from here", flush=True)
    except RTPurboError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
