import math

import pytest
import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation import perplexity
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.perplexity import PerplexitySuite, token_losses
from tests.tiny_models import HEADS, RETRIEVAL_HEADS, make_sparse, sparse_config, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 96


@pytest.fixture(scope="module")
def corpus():
    return load_texts(None, "heldout")


@pytest.fixture
def model():
    return tiny_model(vocab_size=512)


def measure(model, corpus, seed=0):
    return outcome(model, corpus, seed).score


def outcome(model, corpus, seed=0):
    case = Case("perplexity", "prose", LENGTH, 2)
    [outcome] = PerplexitySuite(corpus, seed).run(model, tiny_tokenizer(), case)
    return outcome


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_losses_are_those_of_the_model(monkeypatch, model, chunk):
    monkeypatch.setattr(perplexity, "CHUNK_POSITIONS", chunk)
    ids = torch.arange(30)[None]
    expected = model(ids, labels=ids).loss
    losses = token_losses(model, ids)
    assert losses.shape == (1, 29)
    torch.testing.assert_close(losses.mean(), expected)


def test_perplexity_of_a_model_that_knows_nothing(model, corpus):
    model.lm_head.weight.data.zero_()
    assert measure(model, corpus) == pytest.approx(512)


def test_windows_depend_on_the_seed(model, corpus):
    assert measure(model, corpus) == measure(model, corpus)
    assert measure(model, corpus) != measure(model, corpus, seed=1)


def test_a_sparse_model_that_reads_everything_is_the_dense_one(model, corpus):
    dense = measure(model, corpus)
    make_sparse(model, sparse_config(model, range(HEADS), top_p=1.0))
    assert measure(model, corpus) == pytest.approx(dense, rel=1e-4)


def test_every_query_is_sparse_while_measuring(model, corpus):
    make_sparse(model, sparse_config(model, top_p=0.6))
    assert model.rtpurbo_config.attention.prefill_mode == "dense"
    with model.rtpurbo.counting() as statistics:
        sparse = measure(model, corpus)

    near = 8 + 2  # window and sinks of the tiny models
    layers, heads, windows = 2, len(RETRIEVAL_HEADS), 2
    # The last token is run too, though nothing follows it.
    assert statistics.queries == layers * heads * windows * (LENGTH - near)
    assert 0 < statistics.share_read < 1
    assert model.rtpurbo_config.attention.prefill_mode == "dense"
    assert math.isfinite(sparse)

    model.rtpurbo.set_rule(prefill_mode="row_share", row_share=1.0)
    assert measure(model, corpus) != sparse


def test_the_interval_contains_the_perplexity(model, corpus):
    measured = outcome(model, corpus)
    assert measured.ci95[0] < measured.score < measured.ci95[1]
