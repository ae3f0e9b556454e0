"""What every model is asked: questions of three tasks and held-out prose, with what the teacher says to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from long_tasks import make_examples
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, begin_ids
from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, write_json_atomically
from rtpurbo.models.base import BaseModel
from rtpurbo.training.stage2 import autocast
from rtpurbo.training.targets import states_at
from rtpurbo.training.teacher import TeacherTargets
from rtpurbo.training.vocabulary import log_probabilities, most_likely

ASKED = ("16 keys", "4 values", "variables")
"""Of `long_tasks.TASKS`; the fourth is solved by every arm that solves any of these."""

PROSE = "prose"
PROSE_ROWS = 512
TOP_LOGITS = 10


@dataclass(frozen=True)
class Question:
    """A sequence whose last tokens are to be predicted.

    Attributes:
        kind: a task, or `PROSE`.
        input_ids: prompt and answer, or a window of prose.
        num_labels: how many tokens at the end are predicted.
        selecting: rows that select as decoding steps do: all that predict prose; of an answer all but
            the first, which is the last row of the prompt.
    """

    kind: str
    input_ids: list[int]
    num_labels: int
    selecting: int


@dataclass(frozen=True)
class Asked:
    """A question with the teacher's opinion.

    Attributes:
        question: the question.
        targets: the teacher's likeliest tokens at each label.
        loss: the teacher's mean loss of the labels, in nats.
    """

    question: Question
    targets: TeacherTargets
    loss: float


def label_predictions(
    model: PreTrainedModel,
    question: Question,
    token_ids: Tensor | None = None,
    *,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a model says at the labels.

    Args:
        model: dense or sparse.
        question: what it reads, in one forward.
        token_ids: int64 [labels, tokens] whose log-probabilities are wanted; None for the likeliest.
        exact: in the weights' own precision; else on a GPU in half precision, up to the logits.

    Returns:
        The likeliest tokens [labels, `TOP_LOGITS`]; log-probabilities of the tokens wanted; and those
        of the labels [labels].
    """
    ids, labels = question.input_ids, question.num_labels
    positions = torch.arange(len(ids) - 1 - labels, len(ids) - 1)
    with torch.no_grad():
        with nullcontext() if exact else autocast(model):
            states = states_at(model, ids[:-1], positions)
        # Logits in half precision would have ties, and differ by more than rules do.
        states, head = states.float(), model.get_output_embeddings()
        likeliest, likelihoods = most_likely(states, head, TOP_LOGITS)
        following = torch.tensor(ids, device=states.device)[-labels:, None]
        wanted = likeliest if token_ids is None else token_ids
        found = log_probabilities(states, head, torch.cat([wanted, following], -1))
    return likeliest, likelihoods if token_ids is None else found[:, :-1], found[:, -1]


def make_questions(
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    length: int,
    samples: int,
    windows: int,
    seed: int,
) -> list[Question]:
    """Questions of every task, one of each in turn, and windows of prose; the same for every model.

    Tasks that do not fit the length are left out.
    """
    questions = []
    tasks = fitting_tasks(tokenizer, corpus, length)
    for number in range(samples):
        examples = make_examples(tokenizer, corpus, length, number, seed, tasks)
        for name, example in examples.items():
            answer = len(example.answer_ids)
            ids = [*example.prompt_ids, *example.answer_ids]
            questions.append(Question(name, ids, answer, answer - 1))
    start = begin_ids(tokenizer)
    rows = min(PROSE_ROWS, length // 4)
    for number in range(windows):
        rng = random.Random(f"prose-{length}-{seed}-{number}")
        prose = corpus.sample_tokens(tokenizer, length - len(start), rng)
        questions.append(Question(PROSE, [*start, *prose], rows, rows))
    return questions


def fitting_tasks(tokenizer: PreTrainedTokenizerBase, corpus: TextCorpus, length: int) -> list[str]:
    """Those of `ASKED` that fit a length."""
    fitting = []
    for task in ASKED:
        with suppress(RTPurboError):
            make_examples(tokenizer, corpus, length, 0, tasks=[task])
            fitting.append(task)
    return fitting


def asked_questions(
    folder: Path,
    dense: Callable[[], BaseModel],
    corpus: TextCorpus,
    length: int,
    samples: int,
    windows: int,
    seed: int,
    *,
    exact: bool = False,
) -> list[Asked]:
    """Questions and the teacher's opinion, made once and kept in a folder.

    Args:
        folder: where they are kept.
        dense: gives the teacher, if it is needed.
        corpus: held-out prose.
        length: of the questions, in tokens.
        samples: questions of each task.
        windows: of prose.
        seed: of all.
        exact: as in `label_predictions`.
    """
    stem = folder / f"questions-{length}-{samples}-{windows}-{seed}{'-exact' if exact else ''}"
    texts, opinions = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    if not (texts.is_file() and opinions.is_file()):
        base = dense()
        questions = make_questions(base.tokenizer, corpus, length, samples, windows, seed)
        tensors: dict[str, Tensor] = {}
        for number, question in enumerate(questions):
            predictions = label_predictions(base.model, question, exact=exact)
            names = ("token_ids", "log_probabilities", "labels")
            tensors |= {
                f"{number}.{name}": part.cpu()
                for name, part in zip(names, predictions, strict=True)
            }
        save_tensors_atomically(opinions, tensors)
        write_json_atomically(texts, [vars(question) for question in questions])
    said = load_file(opinions)
    made: list[dict[str, Any]] = json.loads(texts.read_text(encoding="utf-8"))
    return [
        _asked(Question(**fields), partial(_part, said, number))
        for number, fields in enumerate(made)
    ]


def _part(tensors: dict[str, Tensor], number: int, name: str) -> Tensor:
    return tensors[f"{number}.{name}"]


def _asked(question: Question, part: Callable[[str], Tensor]) -> Asked:
    last = len(question.input_ids) - 1
    positions = torch.arange(last - question.num_labels, last)
    answers = torch.full_like(positions, question.kind != PROSE, dtype=torch.bool)
    targets = TeacherTargets(positions, answers, part("token_ids"), part("log_probabilities"))
    return Asked(question, targets, -float(part("labels").mean()))


def kinds_of(asked: Sequence[Asked]) -> list[str]:
    """The kinds of some questions, in their order."""
    return list(dict.fromkeys(one.question.kind for one in asked))
