"""Runs every policy through every test and collects the records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rtpurbo.data.texts import load_texts
from rtpurbo.devices import default_dtype, resolve_device
from rtpurbo.evaluation.battery import Battery
from rtpurbo.evaluation.cells import DEFAULT_SUITES, Cell, check_name, choose_cells
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.evaluation.policies import POLICIES, Source
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.samples import SampleRecord
from rtpurbo.models.artifact import find_artifact
from rtpurbo.models.sparsify import counting, is_sparse
from rtpurbo.settings import Progress, check_context, no_progress

DEFAULT_LENGTHS = (2048, 4096)
DEFAULT_POLICIES = ("full", "rtpurbo")


def evaluate(
    artifact: str | Path,
    *,
    suites: Sequence[str | Cell] = DEFAULT_SUITES,
    lengths: Sequence[int] | Mapping[str, Sequence[int]] = DEFAULT_LENGTHS,
    samples: int = 10,
    policies: Sequence[str] = DEFAULT_POLICIES,
    data: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    cache_length: int | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
    keep_sample: Callable[[SampleRecord], None] = lambda record: None,
    progress: Progress = no_progress,
) -> list[Record]:
    """Measures an artifact: quality, share of far tokens read, and bytes of cache.

    Args:
        artifact: a folder, or a name on the Hugging Face Hub.
        suites: names of `rtpurbo.evaluation.cells.SUITES`; `suite:task,task` takes some tasks of a
            suite, and `suite@2048,8192` has lengths of its own. A `Cell` is one test, with a length
            and samples of its own.
        lengths: tokens of a test, for all suites or by the suite's name.
        samples: questions or windows of each test.
        policies: names of `rtpurbo.evaluation.policies.POLICIES`.
        data: prose, as `load_texts` takes it; its held-out part is used.
        seed: of the tests; the same seed gives every policy the same tests.
        device: where to compute.
        dtype: of the weights; None chooses what suits the device.
        base_model: where to take the base model from, if not from where the artifact says.
        cache_length: tokens at which the cache is weighed; None takes each test's.
        squad: questions of `ruler:qa_1`, a file in SQuAD's format; None takes the built-in ones.
        hotpotqa: those of `ruler:qa_2`, in HotpotQA's distractor format, likewise.
        keep_sample: given every question with its answer.
        progress: told after each sample.

    Raises:
        RTPurboError: a name is unknown, the artifact or a file cannot be loaded, or a test is
            longer than the model's context or too short for its task.
    """
    cells = choose_cells(suites, lengths, samples)
    for name in policies:
        check_name("policy", name, POLICIES)
    device = resolve_device(device)
    source = Source(
        find_artifact(artifact), device, dtype or default_dtype(device), base_model, seed
    )
    corpus = load_texts(data, "heldout")
    battery = Battery(corpus, RulerSuite(Materials.of(corpus, squad, hotpotqa), seed), seed)
    return [
        record
        for name in policies
        for record in _evaluate_policy(
            name, source, cells, battery, cache_length, keep_sample, progress
        )
    ]


def _evaluate_policy(
    name: str,
    source: Source,
    cells: Sequence[Cell],
    battery: Battery,
    cache_length: int | None,
    keep_sample: Callable[[SampleRecord], None],
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
    battery.prepare(tokenizer, cells, progress)
    for cell in cells:
        with _far_tokens_read(model) as share:
            outcome = battery.run(cell, model, tokenizer, after_sample)
        figures = {str(cell): outcome.score}
        progress(name, done, total, figures)
        test = (cell.suite, cell.task, cell.context_length, name, battery.seed)
        for number, sample in enumerate(outcome.samples):
            keep_sample(SampleRecord(*test, number, sample))
        yield Record(
            cell.suite,
            cell.task,
            cell.context_length,
            name,
            cell.samples,
            outcome.score,
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
