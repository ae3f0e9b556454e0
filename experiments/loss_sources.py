"""Where a conversion loses: windows, the choice of heads, the selection, stage 2, told apart by task.

The dense model reads RULER's questions with their answers; then every variant reads the same (teacher forcing),
and its divergence from the dense model and its agreement with the dense model's most likely tokens are measured
at the answers. That is a far finer measure than right or wrong answers to a few questions.

    python experiments/loss_sources.py rank MODEL --data books.jsonl.gz --by gates-group -o gates.json
    python experiments/loss_sources.py measure MODEL --data books.jsonl.gz --map gates.json:kv_group:0.375 -o table.json
    python experiments/loss_sources.py distill MODEL --data books.jsonl.gz --map gates.json:kv_group:0.5 -o stage2.json

`measure` takes a window and sinks with a map (FILE:GRANULARITY:RATIO:WINDOW:SINKS). Run it once a GPU with
`--part I/N`: each takes its share of the questions. Artifacts are measured by their own rule and with dense
retrieval heads; with `--rule` (changes of the attention rule, as JSON), they and maps are measured by each of these
instead. `rank` calibrates by the first of them. `distill` trains a LoRA on synthetic tasks and prose with dense
retrieval heads, and measures the same questions, and prose within the window, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import AutoTokenizer

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.calibration.selection import choose_heads
from rtpurbo.config import AttentionRule, RTPurboConfig, default_sliding_window
from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.sparsify import empty_head_map, restore, runtime, sparsify
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER
from rtpurbo.settings import CalibrationSettings, DistillationSettings
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import distill, predictions
from rtpurbo.training.teacher import (
    TeacherTargets,
    states_at,
    teacher_targets,
    top_logits_divergence,
)
from rtpurbo.training.vocabulary import most_likely

PROSE_LENGTH = 1024

ANSWERS = DistillationSettings(targets="answers", decode_queries=1 << 20)


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
        rule=replace(rule_of(base, arguments), **(arguments.rule or [{}])[0]),
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
    return AttentionRule(
        sliding_window=window, top_p=1.0, dense_prompt_queries=arguments.dense_prompt_queries
    )


def configurations(
    base: BaseModel, names: list[str], rule: AttentionRule
) -> Iterator[tuple[str, RTPurboConfig]]:
    """Configurations from FILE:GRANULARITY:RATIO[:WINDOW[:SINKS]]."""
    heads = base.model.config.num_key_value_heads
    for name in names:
        file, granularity, ratio, *places = name.split(":")
        settings = CalibrationSettings(ratio=float(ratio), granularity=granularity)
        scores = json.loads(Path(file).read_text(encoding="utf-8"))["scores"]
        fields = zip(("sliding_window", "num_sink_tokens"), map(int, places), strict=False)
        found = RTPurboConfig(choose_heads(scores, heads, settings), replace(rule, **dict(fields)))
        yield Path(file).stem + name.removeprefix(file), found


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
    return asked + prose(base, arguments)


def prose(base: BaseModel, arguments: argparse.Namespace) -> list[Asked]:
    """Held-out prose within the window: before stage 2 every variant reads it as the dense model does."""
    corpus = load_texts(arguments.data, "heldout")
    rng = random.Random(arguments.seed)
    read = []
    for _ in range(arguments.samples):
        token_ids = corpus.sample_tokens(base.tokenizer, PROSE_LENGTH, rng)
        sequence = TrainingSequence(list(token_ids), 0)
        targets = teacher_targets(base.model, sequence, ANSWERS, "")
        read.append(Asked("prose", PROSE_LENGTH, sequence, targets))
    return read


@torch.no_grad()
def compare(model: torch.nn.Module, asked: list[Asked]) -> dict[str, list[float]]:
    """Divergence in nats a token and agreement with the dense model's tokens, by length and task."""
    found: dict[str, list[list[float]]] = {}
    for each in asked:
        rows = each.sequence.num_answer_tokens
        there = each.targets.to(model.device)
        with runtime(model).decoding_last(rows):
            values = predictions(model, each.sequence, there)
            states = states_at(model, each.sequence.input_ids, there.positions)
            first, _ = most_likely(states, model.get_output_embeddings(), 1)
        divergence = top_logits_divergence(values, there).mean().item()
        same = (first[:, 0] == there.token_ids[:, 0]).float()
        figures = [divergence, same.mean().item(), float(same.all())]
        found.setdefault(f"{each.length} {each.task}", []).append(figures)
    return {
        key: [fmean(column) for column in zip(*rows, strict=True)] + [len(rows)]
        for key, rows in found.items()
    }


class Table:
    """The figures of all variants, written after each.

    Args:
        path: JSON file.
        lengths: tokens of the questions, whose means are printed.
    """

    def __init__(self, path: Path, lengths: list[int]) -> None:
        self.path, self.lengths = path, lengths
        self.rows: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, model: torch.nn.Module, asked: list[Asked]) -> None:
        """Measures a variant."""
        began = time.monotonic()
        figures = compare(model, asked)
        self.rows[name] = figures
        mean = {
            length: round(fmean(row[0] for key, row in figures.items() if key.startswith(f"{length} ")), 4)
            for length in self.lengths
        }  # fmt: skip
        print(f"{name}: {mean} in {time.monotonic() - began:.0f} s", flush=True)
        write_json_atomically(self.path, self.rows)


def measure(arguments: argparse.Namespace) -> None:
    """Every variant on the questions of this part, as JSON."""
    base = load_model(arguments.model, arguments.device)
    asked = ask(base, arguments)
    table = Table(arguments.output, arguments.lengths)
    rule = rule_of(base, arguments)
    for name, config in configurations(base, arguments.map, rule):
        sparsify(base.model, config)
        for changes in arguments.rule or [{}]:
            with runtime(base.model).rule(**changes):
                table.add(f"{name} {json.dumps(changes)}" if changes else name, base.model, asked)
        restore(base.model)
    if arguments.map:
        sparsify(base.model, RTPurboConfig(empty_head_map(base.model), rule))
        table.add("windows", base.model, asked)
        restore(base.model)
    base.model.cpu()
    for artifact in arguments.artifact:
        has_stage2 = ArtifactConfig.read(Path(artifact)).stage2 != "none"
        dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
        for stage2 in (False, True)[: 1 + has_stage2]:
            model, _ = load(artifact, device=arguments.device, dtype=dtype, stage2=stage2)
            for changes in arguments.rule or [{}, {"top_p": 1.0}]:
                name = f"{Path(artifact).name} stage2={stage2} {json.dumps(changes)}"
                with model.rtpurbo.rule(**changes):
                    table.add(name, model, asked)
            del model


def train_lora(arguments: argparse.Namespace) -> None:
    """A stage 2 with dense retrieval heads; divergences before and after at three scales, as JSON."""
    base = load_model(arguments.model, arguments.device)
    asked = ask(base, arguments)
    table = Table(arguments.output, arguments.lengths)
    [(name, config)] = configurations(base, arguments.map, rule_of(base, arguments))
    shares = dict(share.split("=") for share in arguments.shares)
    settings = DistillationSettings(
        steps=arguments.steps,
        lengths=tuple(arguments.train_lengths),
        learning_rate=arguments.learning_rate,
        lora_rank=arguments.rank,
        lora_beyond_attention=arguments.mlp,
        decode_queries=0,
        mixture={"needles": 0.5} | {task: float(share) for task, share in shares.items()},
    )
    sparsify(base.model, config)
    table.add(f"{name} before", base.model, asked)
    corpus, held_out = (load_texts(arguments.data, part) for part in ("train", "heldout"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output, teacher = Path(folder) / "student", Path(folder) / "teacher"
        output.mkdir()
        distill(
            base.model, base.tokenizer, corpus, held_out, output, settings,
            teacher_folder=teacher,
            progress=lambda stage, done, total, figures: print(
                stage, done, total, figures, round(time.monotonic() - began), flush=True
            ),
        )  # fmt: skip
        student = PeftModel.from_pretrained(base.model, str(output / ADAPTER_FOLDER))
        for scale in (0.5, 1.0):
            with rescale_adapter_scale(student, scale):
                table.add(f"{name} stage 2, scale {scale}", base.model, asked)


def main() -> None:
    """Parses arguments and runs one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model")
    common.add_argument("--data", action="append")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--window", type=int)
    common.add_argument("--dense-prompt-queries", type=int, default=512)
    common.add_argument("--rule", action="append", type=json.loads, metavar="JSON")
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
    training = steps.add_parser("distill", parents=[common, questions])
    training.add_argument("--map", action="append", required=True)
    training.add_argument("--part", default="0/1")
    training.add_argument("--steps", type=int, default=100)
    training.add_argument("--learning-rate", type=float, default=2e-4)
    training.add_argument("--rank", type=int, default=16)
    training.add_argument("--mlp", action="store_true")
    training.add_argument("--train-lengths", type=int, nargs="+", default=[8192, 16384])
    training.add_argument("--shares", nargs="+", default=[], metavar="TASK=SHARE")
    training.set_defaults(run=train_lora)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
