"""What sparse prefill costs in accuracy, rule by rule, on a model that does long-range tasks well.

    python experiments/sparse_prefill.py sharp-8k --data books.jsonl.gz --output sparse-prefill-8k.json
    python experiments/sparse_prefill.py sharp-32k --data books.jsonl.gz --length 32768 --window 1024 \
        --output sparse-prefill-32k.json

Converts the teacher that `sharp_teacher.py` made (41 of 270 heads retrieve), then asks the same
questions under each rule of `prefill_rules.py`. The answer's rows select as decoding steps do under
dense prefill, and as all other rows do under the other rules. Whatever is finished is kept: run the
same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from fast_selection import fast_selection
from long_tasks import SCORING, TASKS, is_predicted, make_examples
from prefill_rules import RULES, PrefillRule
from prefill_table import BlockStatistics, markdown_table
from transformers import AutoTokenizer, PreTrainedModel

from rtpurbo.config import AttentionRule
from rtpurbo.conversion import convert
from rtpurbo.data.needles import RetrievalExample
from rtpurbo.data.texts import TextCorpus, begin_ids, load_texts
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.evaluation.perplexity import token_losses
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load, load_base
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from rtpurbo.models.sparsify import counting, runtime
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
)

NUM_PROSE = 6
TIMED_FORWARDS = 5
Examples = list[dict[str, RetrievalExample]]
"""One example of each task in each round."""


def conversion_settings(arguments: argparse.Namespace) -> ConversionSettings:
    """The library's own stages, at lengths up to the longest and with fewer steps."""
    longest = arguments.length
    return ConversionSettings(
        attention=AttentionRule(sliding_window=arguments.window),
        calibration=CalibrationSettings(length=longest // 2, num_documents=6),
        stage1=IndexerTrainingSettings(
            steps=arguments.stage1_steps, lengths=(longest // 4, longest // 2, longest)
        ),
        stage2=DistillationSettings(
            steps=arguments.stage2_steps,
            lengths=(longest // 4, longest, longest // 2, longest),
            learning_rate=1e-3,
            lora_beyond_attention=True,
            refresh_steps=arguments.refresh_steps,
        ),
        seed=arguments.seed,
    )


def convert_teacher(arguments: argparse.Namespace) -> None:
    """Makes the artifact, unless it is there; goes on with one that was interrupted."""
    if Path(arguments.artifact).is_dir():
        print(f"{arguments.artifact} is there already: conversion is skipped", flush=True)
        return
    reported: dict[str, float] = {}

    def report(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if done == total or time.time() - reported.get(stage, 0.0) > 15:
            reported[stage] = time.time()
            shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{stage} {done} of {total} ({time.time() - began:.0f} s) {shown}", flush=True)

    began = time.time()
    convert(
        arguments.teacher,
        arguments.artifact,
        settings=conversion_settings(arguments),
        data=arguments.data,
        device=arguments.device,
        resume=True,
        progress=report,
    )


def questions(arguments: argparse.Namespace, held_out: TextCorpus) -> Examples:
    """The examples, made once and kept beside the output."""
    path = Path(arguments.output).with_suffix(".questions.json")
    asked = {"length": arguments.length, "samples": arguments.samples, "seed": arguments.seed}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("asked") != asked:
        tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
        make = partial(make_examples, tokenizer, held_out, arguments.length, seed=arguments.seed)
        if arguments.workers:
            with get_context("fork").Pool(arguments.workers) as pool:
                rounds = pool.map(make, range(arguments.samples), chunksize=1)
        else:
            rounds = [make(number) for number in range(arguments.samples)]
        plain = [{task: vars(example) for task, example in examples.items()} for examples in rounds]
        kept = {"asked": asked, "rounds": plain}
        write_json_atomically(path, kept)
    return [
        {task: RetrievalExample(**fields) for task, fields in examples.items()}
        for examples in kept["rounds"]
    ]


def prose(tokenizer: Any, held_out: TextCorpus, length: int, seed: int) -> list[list[int]]:
    """Windows of held-out books."""
    start = begin_ids(tokenizer)
    return [
        start
        + held_out.sample_tokens(
            tokenizer, length - len(start), random.Random(f"prose-{length}-{seed}-{number}")
        )
        for number in range(NUM_PROSE)
    ]


@contextmanager
def following(model: PreTrainedModel, rule: PrefillRule) -> Iterator[None]:
    """Runs the model under a rule."""
    if not is_sparse(model):
        yield
        return
    block_size = replace(model.rtpurbo_config.attention, **rule.changes).block_size
    with runtime(model).rule(**rule.changes), fast_selection(block_size, model.device):
        yield


def share_read(model: PreTrainedModel, rule: PrefillRule, windows: list[list[int]]) -> float:
    """Share of the far keys that retrieval heads read in some prose."""
    with following(model, rule), counting(model) as counts, torch.no_grad():
        for window in windows:
            model.base_model(torch.tensor([window], device=model.device), use_cache=False)
    return counts.share_read or 0.0


def as_dense(model: PreTrainedModel, rule: PrefillRule, windows: list[list[int]]) -> PrefillRule:
    """The rule with the `row_share` that makes it read as much of some prose as another rule."""
    if rule.as_dense_as is None:
        return rule
    wanted = share_read(model, replace(rule, changes=rule.as_dense_as), windows)
    low, high = 2.0**-10, 1.0
    for _ in range(8):
        middle = (low * high) ** 0.5
        tried = replace(rule, changes={**rule.changes, "row_share": middle})
        # A smaller share lists more blocks.
        if share_read(model, tried, windows) > wanted:
            low = middle
        else:
            high = middle
    return replace(rule, changes={**rule.changes, "row_share": (low * high) ** 0.5})


def backend(model: PreTrainedModel) -> str:
    """What served the retrieval heads in the last forward."""
    if not is_sparse(model):
        return "sdpa"
    used = {module.used_backend for module in headwise_modules(model) if module.retrieval_heads}
    return " and ".join(sorted(name for name in used if name))


@torch.no_grad()
def milliseconds(model: PreTrainedModel, window: list[int]) -> float:
    """The median time of a forward over one sequence, logits left out."""
    ids = torch.tensor([window], device=model.device)
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    times = []
    for _ in range(TIMED_FORWARDS + 1):
        wait()
        began = time.perf_counter()
        model.base_model(ids, use_cache=False)
        wait()
        times.append(1000 * (time.perf_counter() - began))
        # A first forward compiles kernels; slow ones need no second look.
        if sum(times[1:]) > 4000:
            break
    return statistics.median(times[1:])


def measure(
    model: PreTrainedModel,
    rule: PrefillRule,
    rounds: Examples,
    windows: list[list[int]],
    seconds: float,
) -> dict[str, Any]:
    """Everything the table says of a rule; no new round of questions begins after some seconds."""
    began = time.time()
    rule = as_dense(model, rule, windows[:2])
    record: dict[str, Any] = {
        "rule": rule.name,
        "model": rule.model,
        "changes": rule.changes,
        "device": device_name(model.device),
    }
    counts = BlockStatistics(**tile_sizes(model, rule))
    with following(model, rule):
        record["milliseconds"] = round(milliseconds(model, windows[0]), 2)
        record["backend"] = backend(model)
        selecting = is_sparse(model) and rule.changes["prefill_mode"] != "dense"
        with counts.watching(model) if selecting else nullcontext():
            losses = [
                token_losses(model, torch.tensor([window], device=model.device)).double().mean()
                for window in windows
            ]
        record["perplexity"] = torch.stack(losses).mean().exp().item()
        record["far_keys_read"] = (counts.share_read or 0.0) if selecting else 1.0
        record["blocks_read"] = (counts.block_share or 0.0) if selecting else 1.0

        right: dict[str, list[bool]] = {task: [] for task in TASKS}
        asking = time.time()
        for number, examples in enumerate(rounds):
            if number and time.time() - asking > seconds:
                break
            for task, example in examples.items():
                rows = len(example.answer_ids) - 1 if rule.decoding else 0
                with runtime(model).decoding_last(rows) if is_sparse(model) else nullcontext():
                    right[task].append(is_predicted(model, example))
        record["backend_in_tasks"] = backend(model)
    record["right"] = right
    record["seconds"] = round(time.time() - began, 1)
    return record


def tile_sizes(model: PreTrainedModel, rule: PrefillRule) -> dict[str, int]:
    """Rows and keys that a block list is counted in."""
    attention = AttentionRule(sliding_window=2**20)
    if is_sparse(model):
        attention = replace(model.rtpurbo_config.attention, **rule.changes)
    return {"row_tile": attention.query_block_size, "key_block": attention.block_size}


def load_model(kind: str, arguments: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The model that a rule asks for."""
    options: dict[str, Any] = {
        "base_model": arguments.teacher,
        "device": device,
        "dtype": getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")),
    }  # fmt: skip
    if kind == "teacher":
        return load_base(Path(arguments.artifact), **options).model
    return load(arguments.artifact, stage2=kind == "sparse", **options)[0]


def main() -> None:
    """Converts, asks and tells, each unless it was done before."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("teacher", help="folder of the model to convert")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="of the weights in the comparison; bfloat16 on a GPU")
    parser.add_argument("--output", required=True, help="the JSON file of the records")
    parser.add_argument(
        "--artifact", help="folder of the sparse model; beside the output if left out"
    )
    parser.add_argument("--length", type=int, default=8192, help="of the longest sequences")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stage1-steps", type=int, default=400)
    parser.add_argument("--stage2-steps", type=int, default=180)
    parser.add_argument("--refresh-steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=50, help="questions a task")
    parser.add_argument(
        "--seconds-per-rule", type=float, default=60, help="after which no more questions are asked"
    )
    parser.add_argument("--rules", nargs="+", help="only rules whose name contains one of these")
    parser.add_argument("--convert-only", action="store_true")
    parser.add_argument("--workers", type=int, default=8, help="processes that make questions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.artifact = (
        arguments.artifact or str(Path(arguments.output).with_suffix("")) + "-artifact"
    )

    device = resolve_device(arguments.device)
    convert_teacher(arguments)
    if arguments.convert_only:
        return
    held_out = load_texts(arguments.data, "heldout")
    rounds = questions(arguments, held_out)
    windows = prose(
        AutoTokenizer.from_pretrained(arguments.teacher), held_out, arguments.length, arguments.seed
    )

    path = Path(arguments.output)
    origin = {
        name: getattr(arguments, name)
        for name in ("length", "window", "samples", "seed", "stage1_steps", "stage2_steps", "refresh_steps")
    }  # fmt: skip
    origin["scoring"] = SCORING
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if results.get("origin") not in (None, origin):
        parser.error(f"{path} was made with other settings: choose another output.")
    records: list[dict[str, Any]] = results.get("records", [])
    model, loaded = None, ""
    for rule in RULES:
        if any(record["rule"] == rule.name for record in records):
            continue
        if arguments.rules and not any(part in rule.name for part in arguments.rules):
            continue
        if model is None or loaded != rule.model:
            model = None
            model, loaded = load_model(rule.model, arguments, device), rule.model
        records.append(measure(model, rule, rounds, windows, arguments.seconds_per_rule))
        write_json_atomically(path, {"origin": origin, "records": records})
        print(f"{rule.name}: {records[-1]['seconds']} s", flush=True)
    print(markdown_table(records))


if __name__ == "__main__":
    main()
