"""Top-p by layer: measured costs, the choice within a budget, and the rule of each layer."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.calibration.answer_sequences import AnswerSequences
from rtpurbo.calibration.layer_top_p import (
    SHARES,
    TOP_P,
    Cost,
    choose_top_p,
    find_layer_top_p,
    mean_share_read,
    measure_costs,
)
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.settings import CalibrationSettings
from rtpurbo.training.sequences import kind_at
from tests.tiny_models import VOCABULARY, any_model, make_sparse, sparse_config, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

VALUES = (0.6, 0.9, 0.99)


class Random:
    """Random tokens; every third sequence has no answer."""

    def sequence(self, number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(2, VOCABULARY, (60,), generator=generator).tolist()
        return Conversation(ids, [(50, 57), (58, 60)] if number % 3 else [])


@pytest.fixture(scope="module")
def model():
    model = tiny_model().to(torch.float64)
    return make_sparse(model, sparse_config(model, top_p=0.6, min_tokens=0))


@pytest.fixture(scope="module")
def costs(model):
    return measure_costs(model, Random(), 4, values=VALUES)


def test_more_mass_reads_more_and_diverges_less(costs, model):
    assert list(costs) == [layer.layer_idx for layer in headwise_modules(model)]
    for by_value in costs.values():
        shares = [by_value[value].share_read for value in VALUES]
        assert 0 < shares[0] <= shares[1] < shares[2] < 1
        assert by_value[0.6].divergence > by_value[0.99].divergence > 0


def test_a_cost_is_that_of_one_layer_at_all_answers(costs, model):
    expected, positions = [], [*range(49, 56), 57, 58]
    for number in (1, 2):
        ids = torch.tensor([Random().sequence(number).input_ids[:59]])
        with torch.no_grad(), runtime(model).rule(top_p=1.0), runtime(model).decoding_last(10):
            dense = model(ids, use_cache=False).logits[0, positions].log_softmax(-1)
            layer = headwise_modules(model)[1]
            layer.rule, before = AttentionRule(**{**vars(layer.rule), "top_p": 0.6}), layer.rule
            found = model(ids, use_cache=False).logits[0, positions].log_softmax(-1)
            layer.rule = before
        expected.append((dense.exp() * (dense - found)).sum(-1).mean().item())
    measured = costs[1][0.6].divergence
    assert measured == pytest.approx(sum(expected) / 2, rel=1e-3)


def test_measuring_leaves_the_model_as_it_was(costs, model):
    rule = model.rtpurbo_config.attention
    assert (rule.top_p, rule.prefill_mode) == (0.6, "dense")
    for layer in headwise_modules(model):
        assert layer.rule == rule
        assert layer.statistics is None


def test_costs_are_those_of_counting_and_lookups():
    corpus = load_texts(None, "train")
    sequences = AnswerSequences(tiny_tokenizer(), corpus, (2000,), 1, SHARES)
    kinds = [kind_at(number, SHARES) for number in range(8)]
    assert sorted(kinds) == ["counting"] * 4 + ["lookup"] * 4
    assert all(sequences.sequence(number).answer_spans for number in range(8))


def test_the_budget_goes_where_divergence_falls_most():
    costs = {
        0: {0.5: Cost(0.001, 0.02), 0.9: Cost(0.0, 0.12)},
        1: {0.5: Cost(0.5, 0.02), 0.9: Cost(0.1, 0.12), 0.98: Cost(0.0, 0.2)},
        2: {0.5: Cost(0.01, 0.02), 0.9: Cost(0.02, 0.12)},
    }
    weights = {0: 2, 1: 1, 2: 2}
    chosen = choose_top_p(costs, weights, 0.06)
    assert chosen == {0: 0.5, 1: 0.98, 2: 0.5}
    assert mean_share_read(costs, weights, chosen) <= 0.06
    assert choose_top_p(costs, weights, 0.045) == {0: 0.5, 1: 0.9, 2: 0.5}
    assert choose_top_p(costs, weights, 0.0) == dict.fromkeys(costs, 0.5)
    assert choose_top_p(costs, weights, 1.0) == {0: 0.9, 1: 0.98, 2: 0.5}


def test_each_layer_has_its_own_rule(model):
    with runtime(model).rule(layer_top_p=(0.3, 0.9)):
        assert [layer.rule.top_p for layer in headwise_modules(model)] == [0.3, 0.9]
        with runtime(model).rule(top_p=1.0):
            assert [layer.rule.top_p for layer in headwise_modules(model)] == [1.0, 1.0]
        with runtime(model).rule(min_tokens=3):
            assert [layer.rule.top_p for layer in headwise_modules(model)] == [0.3, 0.9]
        stored = RTPurboConfig.from_dict(model.rtpurbo_config.to_dict())
        assert stored == model.rtpurbo_config
    assert [layer.rule.top_p for layer in headwise_modules(model)] == [0.6, 0.6]


def test_another_number_of_layers_is_refused(model):
    with pytest.raises(RTPurboError, match="layer_top_p has 3 values, but the model has 2 layers"):
        model.rtpurbo_config.with_rule(layer_top_p=(0.5, 0.6, 0.7))


def test_a_value_out_of_range_is_refused():
    with pytest.raises(RTPurboError, match=r"layer_top_p is 1\.5"):
        AttentionRule(layer_top_p=(0.5, None, 1.5))


def test_the_choice_reads_no_more_than_one_top_p():
    model = tiny_model(vocab_size=512, max_position_embeddings=512).to(torch.float64)
    make_sparse(model, sparse_config(model, top_p=0.8, min_tokens=0))
    settings = CalibrationSettings(length=300, top_p_sequences=2)
    steps = []
    found = find_layer_top_p(
        model, tiny_tokenizer(), load_texts(None, "train"), settings,
        progress=lambda stage, done, total, figures: steps.append((stage, done, total)),
    )  # fmt: skip
    assert steps == [("top-p", 1, 2), ("top-p", 2, 2)]
    heads = model.rtpurbo_config.head_map.retrieval_heads
    assert len(found.values) == len(heads)
    for value, by_value in zip(found.values, found.costs.values(), strict=True):
        assert set(by_value) == {*TOP_P, 0.8}
        assert value in by_value
    weights = {layer: len(heads[layer]) for layer in found.costs}
    chosen = dict(enumerate(found.values))
    assert mean_share_read(found.costs, weights, chosen) <= found.share_read
    assert 0 < found.divergence <= found.divergence_of_one


@pytest.mark.parametrize(("length", "heads"), [(30, None), (300, ())])
def test_nothing_is_chosen_without_answers_or_heads(length, heads):
    model = tiny_model(vocab_size=512, max_position_embeddings=512).to(torch.float64)
    config = sparse_config(model, top_p=0.8, min_tokens=0)
    if heads is not None:
        per_layer = (heads,) * len(config.head_map.retrieval_heads)
        config = replace(config, head_map=replace(config.head_map, retrieval_heads=per_layer))
    make_sparse(model, config)
    settings = CalibrationSettings(length=length, top_p_sequences=2)
    assert find_layer_top_p(model, tiny_tokenizer(), load_texts(None, "train"), settings) is None


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        (
            "gemma3_text",
            {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ("gpt_oss", {"sliding_window": 12}),
        ("falcon_h1", {}),
        ("qwen3_next", {"num_hidden_layers": 4}),
    ],
)
def test_costs_where_layers_have_windows_or_recurrent_states(model_type, changes):
    model = any_model(model_type, **changes).to(torch.float64)
    make_sparse(model, sparse_config(model, min_tokens=0))
    costs = measure_costs(model, Random(), 3, values=(0.6, 1.0))
    assert costs
    for by_value in costs.values():
        # All keys are read, after answers that read fewer.
        assert by_value[1.0].share_read == 1
        assert by_value[1.0].divergence == pytest.approx(0, abs=1e-9)
    assert max(by_value[0.6].divergence for by_value in costs.values()) > 1e-6
