"""Runs every policy through every test and collects the records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.devices import default_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import needle, perplexity
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.evaluation.policies import POLICIES, Source
from rtpurbo.evaluation.records import Record
from rtpurbo.models.artifact import find_artifact
from rtpurbo.models.sparsify import counting, is_sparse
from rtpurbo.settings import Progress, check_context, no_progress

DEFAULT_LENGTHS = (2048, 4096)
DEFAULT_POLICIES = ("full", "rtpurbo")

SUITES: dict[str, tuple[str, ...]] = {
    "needle": tuple(needle.TASKS),
    "perplexity": ("prose",),
}
"""The tasks of every suite."""

DEFAULT_TASKS = {"needle": ("single", "multikey"), "perplexity": ("prose",)}


@dataclass(frozen=True)
class Cell:
    """One test that every policy takes."""

    suite: str
    task: str
    context_length: int
    samples: int

    def __str__(self) -> str:
        return f"{self.suite} {self.task} {self.context_length}"

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: TextCorpus,
        seed: int,
        after_sample: Callable[[], None],
    ) -> float:
        """Accuracy in percent, or perplexity."""
        samples = self.samples
        if self.suite == "perplexity":
            return perplexity.prose_perplexity(
                model, tokenizer, corpus, self.context_length, samples, seed, after_sample
            )
        return needle.needle_accuracy(
            model, tokenizer, corpus, self.task, self.context_length, samples, seed, after_sample
        ).accuracy


def evaluate(
    artifact: str | Path,
    *,
    suites: Sequence[str | Cell] = tuple(SUITES),
    lengths: Sequence[int] | Mapping[str, Sequence[int]] = DEFAULT_LENGTHS,
    samples: int = 10,
    policies: Sequence[str] = DEFAULT_POLICIES,
    data: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    cache_length: int | None = None,
    progress: Progress = no_progress,
) -> list[Record]:
    """Measures an artifact: quality, share of far tokens read, and bytes of cache.

    Args:
        artifact: a folder, or a name on the Hugging Face Hub.
        suites: names of `SUITES`; `suite:task` takes one task of a suite, and `suite@2048,8192` has
            lengths of its own. A `Cell` is one test, with a length and samples of its own.
        lengths: tokens of a test, for all suites or by the suite's name.
        samples: questions or windows of each test.
        policies: names of `rtpurbo.evaluation.policies.POLICIES`.
        data: prose, as `load_texts` takes it; its held-out part is used.
        seed: of the tests; the same seed gives every policy the same tests.
        device: where to compute.
        dtype: of the weights; None chooses what suits the device.
        base_model: where to take the base model from, if not from where the artifact says.
        cache_length: tokens at which the cache is weighed; None takes each test's.
        progress: told after each sample.

    Raises:
        RTPurboError: a name is unknown, the artifact cannot be loaded, or a test is longer than
            the model's context.
    """
    cells = choose_cells(suites, lengths, samples)
    for name in policies:
        check_name("policy", name, POLICIES)
    device = resolve_device(device)
    source = Source(
        find_artifact(artifact), device, dtype or default_dtype(device), base_model, seed
    )
    corpus = load_texts(data, "heldout")
    return [
        record
        for name in policies
        for record in _evaluate_policy(name, source, cells, corpus, cache_length, progress)
    ]


def choose_cells(
    suites: Sequence[str | Cell],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    samples: int,
) -> list[Cell]:
    """The tests that the arguments of `evaluate` name.

    Raises:
        RTPurboError: a suite or task is unknown, a suite has no length, or there are no samples.
    """
    if samples < 1:
        raise RTPurboError(f"the number of samples is {samples}, but it must be at least 1.")
    cells: list[Cell] = []
    for given in suites:
        if isinstance(given, Cell):
            cells.append(given)
            continue
        name, _, own_lengths = given.partition("@")
        suite, _, task = name.partition(":")
        check_name("suite", suite, SUITES)
        if task:
            check_name(f"{suite} task", task, SUITES[suite])
        suite_lengths = lengths.get(suite, ()) if isinstance(lengths, Mapping) else lengths
        if own_lengths:
            suite_lengths = _parse_lengths(given, own_lengths)
        if not suite_lengths or min(suite_lengths) < 2:
            raise RTPurboError(f"the suite '{suite}' needs lengths of at least 2 tokens.")
        cells += [
            Cell(suite, each, length, samples)
            for each in ([task] if task else DEFAULT_TASKS[suite])
            for length in suite_lengths
        ]
    return list(dict.fromkeys(cells))


def _parse_lengths(suite: str, lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise RTPurboError(
            f"'{suite}' does not name lengths: write them as in perplexity@2048,8192."
        ) from error


def check_name(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    """Refuses a name that is not among the known ones, and lists them."""
    if name not in known:
        raise RTPurboError(f"there is no {kind} '{name}': choose from {', '.join(known)}.")


def _evaluate_policy(
    name: str,
    source: Source,
    cells: Sequence[Cell],
    corpus: TextCorpus,
    cache_length: int | None,
    progress: Progress,
) -> Iterator[Record]:
    total, figures = sum(cell.samples for cell in cells), dict[str, float]()
    done = 0

    def after_sample() -> None:
        nonlocal done
        done += 1
        progress(name, done, total, figures)

    progress(name, 0, total, figures)
    model, tokenizer = POLICIES[name].prepare(source)
    check_context(
        "tests",
        max(cell.context_length for cell in cells),
        model.config.max_position_embeddings,
    )
    for cell in cells:
        with _far_tokens_read(model) as share:
            score = cell.score(model, tokenizer, corpus, source.seed, after_sample)
        figures = {str(cell): score}
        progress(name, done, total, figures)
        yield Record(
            cell.suite,
            cell.task,
            cell.context_length,
            name,
            cell.samples,
            score,
            share(),
            cache_bytes(model, cache_length or cell.context_length),
        )
    del model
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _far_tokens_read(model: PreTrainedModel) -> Iterator[Callable[[], float | None]]:
    """Yields a function that tells which share of the far keys was read inside."""
    if not is_sparse(model):
        yield lambda: 1.0
    elif not model.rtpurbo_config.head_map.num_retrieval_heads:
        yield lambda: 0.0
    else:
        with counting(model) as statistics:
            yield lambda: statistics.share_read
