"""Where a conversion loses: windows, the choice of heads, the selection, stage 2, told apart by task.

The dense model reads RULER's questions with their answers; then every variant reads the same (teacher forcing),
and its divergence from the dense model and its agreement with the dense model's most likely tokens are measured
at the answers. That is a far finer measure than right or wrong answers to a few questions.

    python experiments/loss_sources.py rank MODEL --data books.jsonl.gz --by gates-group -o gates.json
    python experiments/loss_sources.py measure MODEL --data books.jsonl.gz --map gates.json:kv_group:0.375 -o table.json

Run `measure` once a GPU with `--part I/N`: each takes its share of the questions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoTokenizer

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.calibration.selection import choose_heads
from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig, default_sliding_window
from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.sparsify import decoding_last, is_sparse, restore, set_rule, sparsify
from rtpurbo.settings import CalibrationSettings, DistillationSettings
from rtpurbo.training.labels import label_states
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import predictions
from rtpurbo.training.teacher import TeacherTargets, teacher_targets, top_logits_divergence
from rtpurbo.training.vocabulary import most_likely

ANSWERS = DistillationSettings(labels="answers", decode_rows=1 << 20)


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        task: of RULER.
        length: tokens of prompt and answer at the most.
        sequence: prompt and answer.
        targets: the dense model's distribution at the answer.
    """

    task: str
    length: int
    sequence: TrainingSequence
    targets: TeacherTargets


def load_model(name: str, device: str) -> BaseModel:
    """The dense model in bfloat16 on a GPU, float32 elsewhere."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return load_base_model(name, device=device, dtype=dtype)


def rank(arguments: argparse.Namespace) -> None:
    """Scores of all heads by one method, as JSON."""
    began = time.monotonic()
    base = load_model(arguments.model, arguments.device)
    corpus = load_texts(arguments.data, "train")
    ranking, _, group = arguments.by.partition("-")
    found = calibrate(
        base.model,
        base.tokenizer,
        corpus,
        CalibrationSettings(
            length=arguments.length,
            num_documents=arguments.steps if ranking == "gates" else 4,
            ratio=arguments.ratio,
            granularity="kv_group" if group else "query_head",
            ranking=ranking,
        ),
        rule=rule_of(base, arguments),
        progress=lambda _, done, total, figures: print(done, total, figures, flush=True),
    )
    scores = [list(row or ()) for row in found.head_map.scores]
    write_json_atomically(
        arguments.output,
        {"by": arguments.by, "seconds": time.monotonic() - began, "scores": scores},
    )


def rule_of(base: BaseModel, arguments: argparse.Namespace) -> AttentionRule:
    """Windows as asked for, or as the model's context suggests."""
    window = arguments.window or default_sliding_window(base.model.config.max_position_embeddings)
    return AttentionRule(sliding_window=window, top_p=1.0)


def head_maps(base: BaseModel, names: list[str]) -> Iterator[tuple[str, HeadMap]]:
    """Head maps from FILE:GRANULARITY:RATIO."""
    heads = base.model.config.num_key_value_heads
    for name in names:
        file, granularity, ratio = name.split(":")
        settings = CalibrationSettings(ratio=float(ratio), granularity=granularity)  # type: ignore[arg-type]
        scores = json.loads(Path(file).read_text(encoding="utf-8"))["scores"]
        found = choose_heads(scores, heads, settings)
        yield f"{Path(file).stem}:{granularity}:{ratio}", found


def make_questions(arguments: argparse.Namespace) -> None:
    """Questions of all tasks and lengths in the folder of `--questions`, by several processes."""
    arguments.questions.mkdir(parents=True, exist_ok=True)
    tests = [(length, task) for length in arguments.lengths for task in arguments.tasks]
    with ProcessPoolExecutor(min(len(tests), os.cpu_count() or 1)) as pool:
        list(pool.map(_make_questions, [arguments] * len(tests), tests))


def _make_questions(arguments: argparse.Namespace, test: tuple[int, str]) -> None:
    length, task = test
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    suite_of(arguments).examples(tokenizer, task, length, arguments.samples)


def suite_of(arguments: argparse.Namespace) -> RulerSuite:
    """RULER's questions about held-out texts."""
    materials = Materials.of(load_texts(arguments.data, "heldout"), None, None)
    return RulerSuite(materials, arguments.seed, arguments.questions)


def ask(base: BaseModel, arguments: argparse.Namespace) -> list[Asked]:
    """Questions of this part with their answers and the dense model's distributions."""
    suite = suite_of(arguments)
    part, parts = (int(number) for number in arguments.part.split("/"))
    asked = []
    for length in arguments.lengths:
        for task in arguments.tasks:
            examples = suite.examples(base.tokenizer, task, length, arguments.samples)
            for example in examples[part::parts]:
                answer = f" {', '.join(example.answers[: 1 if TASKS[task].any_answer else None])}"
                answer_ids = base.tokenizer.encode(answer, add_special_tokens=False)
                sequence = TrainingSequence([*example.prompt_ids, *answer_ids], len(answer_ids))
                targets = teacher_targets(base.model, sequence, ANSWERS, "")
                asked.append(Asked(task, length, sequence, targets))
            print("asked", length, task, flush=True)
    return asked


@torch.no_grad()
def compare(model: torch.nn.Module, asked: list[Asked], selecting: bool) -> dict[str, list[float]]:
    """Divergence in nats a token and agreement with the dense model's tokens, by length and task."""
    found: dict[str, list[list[float]]] = {}
    for each in asked:
        rows = each.sequence.num_answer_tokens if selecting else 0
        there = each.targets.to(model.device)
        with decoding_last(model, rows):
            values = predictions(model, each.sequence, there, there.token_ids)
            states = label_states(model, each.sequence.input_ids, there.positions)
            first, _ = most_likely(states, model.get_output_embeddings(), 1)
        divergence = top_logits_divergence(values, there).mean().item()
        same = (first[:, 0] == there.token_ids[:, 0]).float()
        figures = [divergence, same.mean().item(), float(same.all())]
        found.setdefault(f"{each.length} {each.task}", []).append(figures)
    return {
        key: [fmean(column) for column in zip(*rows, strict=True)] + [len(rows)]
        for key, rows in found.items()
    }


def measure(arguments: argparse.Namespace) -> None:
    """Every variant on the questions of this part, as JSON."""
    base = load_model(arguments.model, arguments.device)
    asked = ask(base, arguments)
    rule = rule_of(base, arguments)
    table = {}

    def note(name: str, began: float, figures: dict[str, list[float]]) -> None:
        table[name] = figures
        mean = {
            length: [
                round(
                    fmean(
                        row[column] for key, row in figures.items() if key.startswith(f"{length} ")
                    ),
                    4,
                )
                for column in range(3)
            ]
            for length in arguments.lengths
        }
        print(f"{name}: {mean} in {time.monotonic() - began:.0f} s", flush=True)
        write_json_atomically(arguments.output, table)

    for name, head_map in head_maps(base, arguments.map):
        began = time.monotonic()
        sparsify(base.model, RTPurboConfig(head_map, rule))
        note(name, began, compare(base.model, asked, selecting=False))
        if not arguments.artifact and name == arguments.map[-1]:
            restore(base.model)
    if is_sparse(base.model):
        restore(base.model)
    began = time.monotonic()
    empty = replace(
        next(head_maps(base, arguments.map[:1]))[1],
        retrieval_heads=((),) * base.model.config.num_hidden_layers,
    )
    sparsify(base.model, RTPurboConfig(empty, rule))
    note("windows", began, compare(base.model, asked, selecting=False))
    base.model.cpu()
    for artifact in arguments.artifact:
        for stage2 in (False, True):
            for top_p in (None, 1.0):
                began = time.monotonic()
                dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
                model, _ = load(artifact, device=arguments.device, dtype=dtype, stage2=stage2)
                if top_p:
                    set_rule(model, top_p=top_p)
                name = f"{Path(artifact).name} stage2={stage2} {'dense' if top_p else 'selection'}"
                note(name, began, compare(model, asked, selecting=not top_p))
                del model


def main() -> None:
    """Parses arguments and runs one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model")
    common.add_argument("--data", action="append")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--window", type=int)
    common.add_argument("--output", "-o", type=Path, default=Path("loss_sources.json"))
    ranking = steps.add_parser("rank", parents=[common])
    ranking.add_argument("--by", default="gates-group")
    ranking.add_argument("--length", type=int, default=16384)
    ranking.add_argument("--steps", type=int, default=80)
    ranking.add_argument("--ratio", type=float, default=0.375)
    ranking.set_defaults(run=rank)
    questions = argparse.ArgumentParser(add_help=False)
    questions.add_argument("--lengths", type=int, nargs="+", default=[16384])
    questions.add_argument("--tasks", nargs="+", default=list(TASKS))
    questions.add_argument("--samples", type=int, default=8)
    questions.add_argument("--seed", type=int, default=7)
    questions.add_argument("--questions", type=Path)
    making = steps.add_parser("questions", parents=[common, questions])
    making.set_defaults(run=make_questions)
    measuring = steps.add_parser("measure", parents=[common, questions])
    measuring.add_argument("--map", action="append", default=[])
    measuring.add_argument("--artifact", action="append", default=[])
    measuring.add_argument("--part", default="0/1")
    measuring.set_defaults(run=measure)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
