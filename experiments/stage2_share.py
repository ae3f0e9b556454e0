"""How far from the dense model does a share of stage 2 lead, by kind of question?

    python experiments/stage2_share.py ARTIFACT --data books.jsonl.gz --length 4096 --count 4 --output share.json

The weights are those before stage 2 and a share of the way to those after it; the artifact has to be one
that keeps all of it (`stage2.lora_scale` 1). Each is charged with the divergence of its predictions from those
of the dense model, in nats a token: on held-out sequences of the kinds that stage 2 trains on, along their
answers or, in prose, on every sixteenth row behind a window; and on RULER's questions, of another seed than
`rtpurbo eval` has by default, along what the dense model answers. Retrieval heads are dense: what is
measured are windows and weights. The file is written after each question, and another call goes on with it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.devices import default_dtype, device_name, resolve_device
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load, load_base
from rtpurbo.models.artifact_folder import find_artifact
from rtpurbo.models.sparsify import using_rule
from rtpurbo.training.lora_scale import SCALES as SHARES
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.version import library_commit

SEED = 1_000
MOST_ANSWER_TOKENS = 48
ROWS_APART = 16
KINDS = ("needles", "haystack", "variables", "passage", "counting", "reading", "prose")
"""Kinds of stage 2's own sequences."""


@dataclass(frozen=True)
class Question:
    """Tokens, and the rows whose predictions count."""

    input_ids: Tensor
    rows: Tensor


class Questions:
    """All that is asked.

    Args:
        dense: answers RULER's questions.
        tokenizer: its.
        corpus: held-out prose.
        length: tokens.
        window: behind which rows of prose count.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: TextCorpus,
        length: int,
        window: int,
    ) -> None:
        self.dense, self.tokenizer = dense, tokenizer
        self.length, self.window = length, window
        self.mix = TrainingMix(tokenizer, corpus, (length,), {}, SEED, "share")
        self.ruler = RulerSuite(Materials.of(corpus), SEED)

    def draw(self, kind: str, number: int, count: int) -> Question:
        """One of `count` of a kind of `KINDS`, or of a task of RULER."""
        if kind in KINDS:
            sequence = self.mix.of_kind(kind, number)
            ids, answer = sequence.input_ids, sequence.num_answer_tokens
            if not answer:
                rows = torch.arange(self.window, len(ids) - 1, ROWS_APART)
                return Question(torch.tensor([ids]), rows)
        else:
            example = self.ruler.examples(self.tokenizer, kind, self.length, count)[number]
            prompt = torch.tensor([list(example.prompt_ids)], device=self.dense.device)
            most = min(TASKS[kind].tokens_to_generate, MOST_ANSWER_TOKENS)
            written = self.dense.generate(prompt, max_new_tokens=most, do_sample=False)
            ids, answer = written[0].tolist(), written.shape[1] - prompt.shape[1]
        rows = torch.arange(len(ids) - 1 - answer, len(ids) - 1)
        return Question(torch.tensor([ids]), rows)


class Shares:
    """A sparse model that can have any share of its stage 2.

    Args:
        before: its weights without stage 2.
        model: with all of it.
    """

    def __init__(self, before: PreTrainedModel, model: PreTrainedModel) -> None:
        self.model = model
        start = before.state_dict()
        self._weights = [
            (start[name].float(), weight.float().clone(), weight)
            for name, weight in model.state_dict().items()
            if name in start
        ]

    @torch.no_grad()
    def take(self, share: float) -> PreTrainedModel:
        """The model with so much of it."""
        for start, end, weight in self._weights:
            weight.copy_(start + share * (end - start))
        return self.model


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, question: Question) -> Tensor:
    """What a model expects after the rows that count: [rows, vocabulary]."""
    states = model.base_model(question.input_ids.to(model.device), use_cache=False)[0]
    logits = model.get_output_embeddings()(states[0, question.rows.to(model.device)])
    return logits.float().log_softmax(-1)


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Nats a row that the student's predictions are away from the teacher's."""
    return (teacher.exp() * (teacher - student)).sum(-1).mean().item()


def as_table(records: list[dict[str, Any]]) -> str:
    """Means by kind, in Markdown."""
    lines = [
        "| | " + " | ".join(f"{share:g}" for share in SHARES) + " |",
        "|---" * (len(SHARES) + 1) + "|",
    ]
    for kind in dict.fromkeys(record["kind"] for record in records):
        own = [record["divergence"] for record in records if record["kind"] == kind]
        means = (fmean(each[f"{share:g}"] for each in own) for share in SHARES)
        lines.append(f"| {kind} ({len(own)}) | " + " | ".join(f"{x:.4f}" for x in means) + " |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--data", required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--count", type=int, default=4, help="questions of each kind")
    parser.add_argument("--kinds", default=",".join([*KINDS, *TASKS]))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    kinds = options.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS) - set(TASKS)):
        parser.error(f"there is no kind {unknown[0]}: choose of {', '.join([*KINDS, *TASKS])}.")
    device = resolve_device(options.device)
    place: dict[str, Any] = {"device": device, "dtype": default_dtype(device)}
    folder = find_artifact(options.artifact)
    dense = load_base(folder, **place).model
    model, tokenizer = load(folder, **place)
    shares = Shares(dense, model)
    window = model.rtpurbo_config.attention.near_window
    corpus = load_texts([options.data], "heldout")
    questions = Questions(dense, tokenizer, corpus, options.length, window)

    records: list[dict[str, Any]] = []
    if options.output.exists():
        records = json.loads(options.output.read_text(encoding="utf-8"))["records"]
    done = {(record["kind"], record["number"], record["length"]) for record in records}
    for number in range(options.count):
        for kind in kinds:
            if (kind, number, options.length) in done:
                continue
            question = questions.draw(kind, number, options.count)
            teacher = log_probabilities(dense, question)
            with using_rule(model, prefill_mode="dense"):
                found = {
                    f"{share:g}": divergence(
                        teacher, log_probabilities(shares.take(share), question)
                    )
                    for share in SHARES
                }
            records.append(
                {"kind": kind, "number": number, "length": options.length, "divergence": found}
            )
            print(f"{kind} {number}: {found}", flush=True)
            write_json_atomically(
                options.output,
                {
                    "model": options.artifact,
                    "device": device_name(device),
                    "torch": torch.__version__,
                    "commit": library_commit(),
                    "command": shlex.join(["python", *sys.argv]),
                    "records": records,
                },
            )
    print(as_table([record for record in records if record["length"] == options.length]))


if __name__ == "__main__":
    main()
