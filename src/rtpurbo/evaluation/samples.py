"""Questions and answers of cases, so that two runs can be compared question by question."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.files import write_text_atomically


@dataclass(frozen=True)
class Sample:
    """A question with the model's answer.

    Attributes:
        answers: expected strings.
        generated: the model's text.
        score: 100 if the answer is correct, 0 if not, or between if some expected strings are missing.
        prompt_tokens: length of the prompt.
        prompt_hash: short hash of the prompt, to compare prompts of two runs.
    """

    answers: list[str]
    generated: str
    score: float
    prompt_tokens: int
    prompt_hash: str

    @classmethod
    def of(
        cls, prompt_ids: Sequence[int], answers: Sequence[str], generated: str, score: float
    ) -> Sample:
        """Returns a sample with length and hash of its prompt."""
        digest = hashlib.sha256(array("i", prompt_ids).tobytes()).hexdigest()[:16]
        return cls(list(answers), generated, score, len(prompt_ids), digest)


@dataclass(frozen=True)
class Outcome:
    """Score of a case by one metric.

    Attributes:
        score: correct answers in percent, or perplexity.
        ci95: 95 % interval of the score, by bootstrap over questions or windows; None if the score is
            not a mean over them.
        count: number of questions or windows.
        samples: all questions; empty for perplexity.
        metric: name of the metric, where a suite has several.
    """

    score: float
    ci95: tuple[float, float] | None
    count: int
    samples: tuple[Sample, ...] = ()
    metric: str | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], metric: str | None = None) -> Outcome:
        """Returns the mean score of at least one sample."""
        scores = [sample.score for sample in samples]
        interval = bootstrap_interval(scores)
        return cls(fmean(scores), interval, len(samples), tuple(samples), metric)

    @classmethod
    def of_losses(cls, losses: Sequence[float]) -> Outcome:
        """Returns the perplexity from the mean loss per token of each window, at least one."""
        low, high = bootstrap_interval(losses)
        return cls(math.exp(fmean(losses)), (math.exp(low), math.exp(high)), len(losses))


@dataclass(frozen=True)
class SampleRecord:
    """A sample and its case.

    Attributes:
        suite: as in `rtpurbo.evaluation.records.Record`, like the next three.
        task: of the suite.
        context_length: tokens.
        policy: name.
        seed: of the case.
        number: of the question in the case, from 0.
        sample: the question and the answer.
        metric: as in `Record`.
    """

    suite: str
    task: str
    context_length: int
    policy: str
    seed: int
    number: int
    sample: Sample
    metric: str | None = None


def write_samples(path: str | Path, records: Sequence[SampleRecord]) -> None:
    """Writes one line of JSON per sample."""
    lines = (json.dumps(row_of_sample(record), ensure_ascii=False) + "\n" for record in records)
    write_text_atomically(path, "".join(lines))


def read_samples(path: str | Path) -> list[SampleRecord]:
    """Returns the samples that `write_samples` wrote.

    Raises:
        RTPurboError: the file is missing or corrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise RTPurboError(f"there is no file of samples {path}; check the path.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [sample_of_row(strict_json.parse(line)) for line in lines if line]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RTPurboError(f"{path} holds no samples or is corrupt; evaluate again.") from error


def row_of_sample(record: SampleRecord) -> dict[str, Any]:
    """Returns a row of JSON, without the nesting of `sample`."""
    row = asdict(record)
    return row | row.pop("sample")


def sample_of_row(row: dict[str, Any]) -> SampleRecord:
    """Returns the sample of a row of JSON."""
    names = Sample.__dataclass_fields__
    sample = Sample(**{name: row[name] for name in names})
    return SampleRecord(**{name: row[name] for name in row if name not in names}, sample=sample)
