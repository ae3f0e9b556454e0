"""Logged answers as outcomes, without lm-eval."""

import pytest

from rtpurbo.evaluation.harness.suite import outcomes_of
from tests.tiny_tokenizer import tiny_tokenizer


def logged(metric, value, chosen="none", target="7", answer="it is 7"):
    return {
        "filter": chosen,
        "metrics": [metric],
        metric: value,
        "arguments": [("How many?", {"until": []})],
        "target": target,
        "resps": [[answer]],
        "doc_id": 0,
    }


def outcomes(samples, aggregated=None, higher=None):
    return outcomes_of(samples, aggregated or {}, higher or {}, tiny_tokenizer())


def test_shares_become_percent_and_samples_are_kept():
    [outcome] = outcomes([logged("exact_match", 1), logged("exact_match", 0.0, answer="8")])
    assert (outcome.score, outcome.count, outcome.metric) == (50.0, 2, "exact_match")
    assert outcome.ci95 == (0.0, 100.0)
    right, wrong = outcome.samples
    assert (right.answers, right.generated, right.score) == (["7"], "it is 7", 100.0)
    assert (wrong.generated, wrong.score) == ("8", 0.0)
    assert right.prompt_tokens > 1


def test_metrics_that_are_no_shares_are_unchanged():
    [outcome] = outcomes([logged("bleu", 34.5), logged("bleu", 0.5)])
    assert outcome.score == 17.5
    [outcome] = outcomes([logged("loss", 0.5)], higher={"loss": False})
    assert outcome.score == 0.5


def test_every_filter_has_an_outcome():
    found = outcomes([logged("exact_match", 1, "strict"), logged("exact_match", 0, "flexible")])
    assert [item.metric for item in found] == ["exact_match,strict", "exact_match,flexible"]


def test_other_lengths_of_ruler_are_left_out():
    sample = logged("2048", 1.0, target=["7", "8"]) | {"metrics": ["4096", "2048"], "4096": -1.0}
    [outcome] = outcomes([sample])
    assert (outcome.score, outcome.metric) == (100.0, "string_match")
    assert outcome.samples[0].answers == ["7", "8"]


def test_metrics_that_are_no_means_are_taken_from_lm_eval():
    samples = [logged("word_perplexity", (-3.0, 2))]
    [outcome] = outcomes(samples, {"word_perplexity,none": 4.5})
    assert (outcome.score, outcome.ci95, outcome.samples) == (4.5, None, ())
    assert outcomes(samples) == []
    assert pytest.approx(outcome.count) == 1
