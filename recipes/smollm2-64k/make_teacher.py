"""Extends SmolLM2-135M-Instruct to 65,536 tokens in three stages, and tests the result.

    python recipes/smollm2-64k/make_teacher.py --data books.jsonl.gz --output smollm2-64k

Repeat the command to continue, until its last line says that all is done; on two GPUs, start it with
`torchrun --nproc-per-node 2` instead of `python`. README.md in this folder describes stages and options.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from long_tasks import SCORING, TASKS, is_predicted, make_examples
from low_rank import base_model_of, factors, save_difference, with_difference
from teacher_training import TeacherSettings, change_context, make_teacher, print_progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.files import whole_folder, write_json_atomically
from rtpurbo.formats import short_length
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.processes import SINGLE_PROCESS, Processes, init_distributed, shutdown_distributed
from rtpurbo.reporting.model_card import markdown_rows
from rtpurbo.settings import no_progress

ADAPTER_RANK = 48

STAGES = {
    "8k": TeacherSettings(
        steps=400,
        lengths=(2048, 8192, 4096, 8192),
        context=8192,
        rope_theta=1e6,
        embeddings=False,
    ),
    "32k": TeacherSettings(
        steps=350,
        lengths=(8192, 32768, 16384, 32768),
        context=32768,
        embeddings=False,
    ),
    "64k": TeacherSettings(
        steps=300,
        lengths=(4096, 65536, 16384, 65536, 8192, 32768),
        context=65536,
        learning_rate=5e-4,
        lora_rank=ADAPTER_RANK,
        tokens=131072,
        gradient_checkpointing=True,
    ),
}
"""Each stage starts from the model of the previous one; a LoRA starts from the difference from the base model so
far, truncated to its rank."""

LENGTHS = (8192, 16384, 32768, 65536)
QUICK_LENGTHS = (1024, 2048)
SHORTEST = 1024
"""Fewer tokens leave no room for needles and questions."""


def quick(settings: TeacherSettings) -> TeacherSettings:
    """Returns the settings with about a sixteenth of the lengths and three steps, for tests."""
    return replace(
        settings,
        steps=3,
        lengths=tuple(max(SHORTEST, length // 16) for length in settings.lengths),
        tokens=8192,
        tokens_at_once=2048,
        labels=128,
        warmup_steps=1,
        checkpoint_every=1,
    )


def make_stages(
    arguments: argparse.Namespace, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> Path:
    """Runs the stages that are not finished, and returns the last one's folder."""
    prose, before = None, arguments.begin
    for name, settings in stages_of(arguments).items():
        folder = arguments.output / name
        if not folder.is_dir():
            prose = prose or load_texts(arguments.data, "train")
            base = load_base_model(str(before) if before else arguments.model, device=device)
            start = None
            if before and settings.lora_rank:
                made, base = base, load_base_model(arguments.model, device=device)
                start = begin_with_difference(base.model, made.model, settings.lora_rank)
            if processes.is_main:
                print(
                    f"stage {name}: {settings.steps} steps, {settings.lengths} tokens", flush=True
                )
            progress = print_progress if processes.is_main else no_progress
            make_teacher(
                base, prose, settings, folder, arguments.workers, progress, processes, start
            )
            processes.wait()
        before = folder
    return folder


def begin_with_difference(
    model: PreTrainedModel, made: PreTrainedModel, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Prepares a base model for a LoRA that starts from another model of its shape.

    Args:
        model: the base; gets the other's vectors and configuration.
        made: the other.
        rank: of the LoRA.

    Returns:
        For every matrix that differs, the two factors nearest to the difference.
    """
    change_context(
        model, made.config.max_position_embeddings, made.config.rope_parameters["rope_theta"]
    )
    after, start = dict(made.named_parameters()), {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(after[name])
            elif not torch.equal(weight.to(torch.bfloat16), after[name].to(torch.bfloat16)):
                start[name] = factors(weight, after[name], rank)
    return start


def stages_of(arguments: argparse.Namespace) -> dict[str, TeacherSettings]:
    """The stages that were asked for."""
    stages = {}
    for name, settings in list(STAGES.items())[-1 if arguments.begin else 0 :]:
        stages[name] = replace(
            quick(settings) if arguments.quick else settings,
            seed=arguments.seed,
            lora_rank=arguments.rank if settings.lora_rank else 0,
        )
        if arguments.steps:
            stages[name] = replace(stages[name], steps=arguments.steps)
        if name == arguments.until:
            break
    return stages


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


def make_all(
    arguments: argparse.Namespace, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> None:
    """Runs all stages, makes the adapter and the model from it, and tests the model."""
    last = make_stages(arguments, device, processes)
    if not processes.is_main or arguments.until:
        return
    teacher = last
    if arguments.rank:
        teacher, adapter = arguments.output / "teacher", arguments.output / "adapter"
        base = load_base_model(arguments.model)
        if not adapter.is_dir():
            made = load_base_model(str(last), device=device)
            figures = save_difference(base, made.model, adapter, arguments.rank)
            print(
                f"{adapter}: {figures['bytes'] / 2**20:.1f} MiB, {figures['kept']:.2%} of the "
                "squared difference",
                flush=True,
            )
        if not teacher.is_dir():
            rebuild(base, adapter, teacher)
    if arguments.samples:
        test(arguments, teacher, device)
    print(f"all done: {teacher}")


def test(arguments: argparse.Namespace, teacher: Path, device: torch.device) -> None:
    """Asks the teacher the remaining questions, and prints a table."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    held_out = load_texts(arguments.data, "heldout")
    made = load_base_model(str(teacher), device=device, dtype=dtype)
    found = answers_of(
        made.model,
        made.tokenizer,
        held_out,
        QUICK_LENGTHS if arguments.quick else LENGTHS,
        arguments.samples,
        arguments.output / "answers.json",
    )
    print(f"{SCORING}\n\nFull attention, questions a cell: {arguments.samples}\n\n{table(found)}\n")


def rebuild(base: BaseModel, adapter: Path, output: Path) -> None:
    """Writes the folder of the model that an adapter and its base model make."""
    model = with_difference(base, adapter).to(torch.bfloat16)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    print(f"written to {output}")


def main() -> None:
    """Parses the arguments and runs the recipe until it is done or stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--data", nargs="+", help="books; Python's documentation if left out")
    parser.add_argument(
        "--model",
        help="folder or name of the base model; left out: the default one, or with --rebuild the adapter's",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, help="seconds, after which to stop cleanly")
    parser.add_argument(
        "--begin",
        type=Path,
        help="model of this recipe from which to train the last stage again",
    )
    parser.add_argument("--steps", type=int, help="of the last stage, with --begin")
    parser.add_argument("--until", choices=STAGES, help="last stage to run")
    parser.add_argument(
        "--rank",
        type=int,
        default=ADAPTER_RANK,
        help="rank of the last stage's LoRA and of the adapter; 0 trains all weights, without an adapter",
    )
    parser.add_argument(
        "--rebuild", type=Path, help="adapter from which to write the model's folder"
    )
    parser.add_argument("--samples", type=int, default=12, help="questions per task and length")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="short sequences and few steps, for tests"
    )
    arguments = parser.parse_args()
    if arguments.steps is not None and (arguments.steps < 1 or not arguments.begin):
        parser.error("--steps takes a positive number, and needs --begin")
    try:
        if arguments.rebuild:
            name = arguments.model or base_model_of(arguments.rebuild)
            rebuild(load_base_model(name), arguments.rebuild, arguments.output)
            return
        device = resolve_device(arguments.device)
        processes = init_distributed(device)
        with stopping_cleanly(arguments.time_limit):
            make_all(arguments, processes.device(device), processes)
    except StoppedBySignalError:
        print("stopped: repeat the command to continue", flush=True)
    except RTPurboError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        shutdown_distributed()


if __name__ == "__main__":
    main()
