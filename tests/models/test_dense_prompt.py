"""The last queries of a prompt that is read in one forward are dense in local heads."""

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.conversion.defaults import default_settings
from rtpurbo.errors import RTPurboError
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import restore, runtime
from tests.tiny_models import (
    LENGTH,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)

# Dense retrieval heads, so that only windows lose.
RULE = {"top_p": 1.0, "dense_prompt_queries": 12}


def logits(model, **options):
    ids, mask = padded_batch()
    return logits_of(model, ids, mask, **options), mask


def one_forward(model):
    return logits(model, chunks=[LENGTH], cache=HeadwiseCache(model))


@pytest.mark.parametrize("setting", ["dense_prompt_queries", "dense_prompt_tokens"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_they_equal_the_dense_model_where_all_queries_are_dense(family, setting):
    model = sparse_model(family, **RULE | {setting: LENGTH})
    found, mask = one_forward(model)
    restore(model)
    expected, _ = logits(model)
    assert_same_logits(found, expected, mask)


def test_the_queries_before_them_keep_their_windows():
    model = sparse_model(**RULE)
    found, mask = one_forward(model)
    with runtime(model).rule(dense_prompt_queries=0):
        windowed, _ = one_forward(model)
    before = slice(0, LENGTH - 12)
    assert_same_logits(found[:, before], windowed[:, before], mask[:, before])
    assert not torch.allclose(found[:, -12:], windowed[:, -12:])


def test_a_longer_prompt_has_dense_queries_at_its_end():
    tokens = LENGTH - 10
    rule = AttentionRule(dense_prompt_tokens=tokens)
    assert [rule.num_dense_queries(length) for length in (0, 1, tokens)] == [0, 1, tokens]
    assert rule.num_dense_queries(tokens + 1) == tokens - 1
    model = sparse_model(**RULE | {"dense_prompt_tokens": tokens})
    found, mask = one_forward(model)
    count = tokens**2 // LENGTH
    assert 12 < count < LENGTH
    with runtime(model).rule(dense_prompt_tokens=0, dense_prompt_queries=count):
        assert_same_logits(found, one_forward(model)[0], mask)
    with runtime(model).rule(dense_prompt_tokens=0):
        assert not torch.allclose(found, one_forward(model)[0])


def test_later_chunks_keep_their_windows():
    # In one layer, keys and values do not depend on the attention of earlier chunks.
    model = tiny_model(num_hidden_layers=1).to(torch.float64)
    make_sparse(model, sparse_config(model, **RULE))
    found, mask = logits(model, chunks=[30, 14], cache=HeadwiseCache(model))
    with runtime(model).rule(dense_prompt_queries=0):
        windowed, _ = logits(model, chunks=[30, 14], cache=HeadwiseCache(model))
    assert_same_logits(found[:, 30:], windowed[:, 30:], mask)
    assert not torch.allclose(found[:, :30], windowed[:, :30])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("dense", [12, LENGTH])
def test_training_computes_prompt_and_answer_as_generation_does(dense, steps):
    model = sparse_model(prefill_mode="dense", top_p=0.6, dense_prompt_queries=dense)
    chunks = [LENGTH - steps, *[1] * steps]
    expected, mask = logits(model, chunks=chunks, cache=HeadwiseCache(model))
    with runtime(model).decoding_last(steps):
        found, _ = logits(model)
        assert_same_logits(found, expected, mask)
        with runtime(model).rule(dense_prompt_queries=0):
            assert not torch.allclose(found, logits(model)[0])


def test_a_sequence_without_a_prompt_has_none():
    model = sparse_model(**RULE)
    found, _ = logits(model)
    with runtime(model).rule(dense_prompt_queries=0):
        assert torch.equal(found, logits(model)[0])


def test_a_sequence_in_which_every_query_selects_has_no_prompt():
    model = sparse_model(**RULE | {"dense_prompt_tokens": LENGTH})
    with runtime(model).decoding_last(LENGTH):
        found, _ = logits(model)
        with runtime(model).rule(dense_prompt_tokens=0, dense_prompt_queries=0):
            assert torch.equal(found, logits(model)[0])


@pytest.mark.parametrize("setting", ["dense_prompt_queries", "dense_prompt_tokens"])
def test_a_negative_number_is_refused(setting):
    with pytest.raises(RTPurboError, match=f"{setting} is -1"):
        AttentionRule(**{setting: -1})


@pytest.mark.parametrize(
    ("effort", "dense"), [("quick", 512), ("standard", 32768), ("thorough", 32768)]
)
def test_conversions_have_them(effort, dense):
    assert default_settings(effort, 32768).attention.num_dense_queries(32768) == dense
