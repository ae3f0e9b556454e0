import math

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.paths import log_path, samples_path
from rtpurbo.evaluation.samples import (
    Outcome,
    Sample,
    SampleRecord,
    read_samples,
    write_samples,
)

SAMPLES = [
    Sample.of([1, 2, 3], ["12", "é"], "it is 12\u2028 and é", 100.0),
    Sample.of([1, 2, 4], ["13"], "", 0.0),
]
RECORDS = [
    SampleRecord("ruler", "vt", 4096, "full", 0, number, sample)
    for number, sample in enumerate(SAMPLES)
]


def test_round_trip(tmp_path):
    path = samples_path(tmp_path / "results.json")
    assert path.name == "results.samples.jsonl"
    assert samples_path("top-p-0.9").name == "top-p-0.9.samples.jsonl"
    assert log_path("top-p-0.9.json").name == "top-p-0.9.log.jsonl"
    write_samples(path, RECORDS)
    assert read_samples(path) == RECORDS
    assert len(path.read_text().split("\n")) == 3


def test_the_hash_is_of_the_prompt():
    assert SAMPLES[0].prompt_tokens == 3
    assert SAMPLES[0].prompt_hash != SAMPLES[1].prompt_hash
    assert Sample.of((1, 2, 3), [], "", 0.0).prompt_hash == SAMPLES[0].prompt_hash


def test_the_outcome_is_the_mean():
    outcome = Outcome.of(SAMPLES, "exact_match")
    assert (outcome.score, outcome.count, outcome.samples) == (50.0, 2, tuple(SAMPLES))
    assert outcome.ci95 == (0.0, 100.0)
    assert outcome.metric == "exact_match"


def test_perplexity_is_of_the_mean_loss():
    outcome = Outcome.of_losses([2.0, 3.0])
    assert outcome.score == pytest.approx(math.exp(2.5))
    assert outcome.ci95 == pytest.approx((math.exp(2), math.exp(3)))
    assert (outcome.count, outcome.samples) == (2, ())


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(RTPurboError, match="there is no file of samples"):
        read_samples(tmp_path / "nothing.jsonl")
    for content in ("x", "{}", "[1]", "3"):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(RTPurboError, match="corrupt"):
            read_samples(tmp_path / "bad.jsonl")
