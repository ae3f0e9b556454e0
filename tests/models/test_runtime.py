import itertools

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.ops import SelectionStatistics
from tests.tiny_models import logits_of, padded_batch, sparse_model, tiny_model

NAMES = (
    "dense",
    "rule",
    "statistics",
    "num_decode_queries",
    "observer",
    "document_lengths",
    "gates",
    "answer_spans",
    "prompt",
    "kept_prompt",
)


def settings(model):
    return [model.rtpurbo_config] + [
        getattr(module, name) for module in headwise_modules(model) for name in NAMES
    ]


CONTEXTS = {
    "dense": lambda runtime: runtime.dense(),
    "rule": lambda runtime: runtime.rule(top_p=0.2),
    "counting": lambda runtime: runtime.counting(),
    "decoding_last": lambda runtime: runtime.decoding_last(3),
    "observed": lambda runtime: runtime.observed(print),
    "keeping_prompt": lambda runtime: runtime.keeping_prompt(3),
    "packed": lambda runtime: runtime.packed((20, 24)),
    "gated": lambda runtime: runtime.gated({layer: torch.ones(3) for layer in range(2)}),
}


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(CONTEXTS, repeat=2)))
def test_every_context_restores_the_previous_state(outer, inner):
    model = sparse_model()
    runtime, before = model.rtpurbo, settings(model)
    with CONTEXTS[outer](runtime):
        within = settings(model)
        with CONTEXTS[inner](runtime), CONTEXTS[outer](runtime):
            pass
        # Tensors are compared by identity: gates must be the same objects.
        assert all(a is b or a == b for a, b in zip(settings(model), within, strict=True))
    assert settings(model) == before


def test_a_failing_block_restores_too():
    model = sparse_model()
    before = settings(model)
    with pytest.raises(KeyError), model.rtpurbo.dense(), model.rtpurbo.rule(top_p=0.2):
        raise KeyError
    assert settings(model) == before


def test_dense_inside_dense_stays_dense():
    model, plain = sparse_model(), tiny_model().double()
    ids, mask = padded_batch()
    expected = logits_of(plain, ids, mask)
    with model.rtpurbo.dense():
        with model.rtpurbo.dense():
            pass
        torch.testing.assert_close(logits_of(model, ids, mask), expected)
    assert not torch.allclose(logits_of(model, ids, mask), expected)


def test_observing_inside_dense_and_counting_inside_counting():
    model = sparse_model()
    ids, mask = padded_batch()
    seen, all_of_it = [], SelectionStatistics()
    with model.rtpurbo.counting(all_of_it):
        with model.rtpurbo.counting() as some:
            logits_of(model, ids, mask)
        logits_of(model, ids, mask)
    assert some.queries == all_of_it.queries > 0
    with model.rtpurbo.dense(), model.rtpurbo.observed(seen.append, dense=False):
        logits_of(model, ids, mask)
        assert all(module.dense for module in headwise_modules(model))
    assert [item.layer for item in seen] == [0, 1]


def test_one_context_manager_serves_once_but_the_runtime_serves_always():
    model = sparse_model()
    runtime = model.rtpurbo
    for top_p in (0.2, 0.3):
        with runtime.rule(top_p=top_p):
            assert model.rtpurbo_config.attention.top_p == top_p
    assert model.rtpurbo_config.attention.top_p == 0.6


def test_a_dense_model_has_no_settings_to_change():
    model = tiny_model()
    with pytest.raises(RTPurboError, match="the model is dense"):
        runtime(model)
    assert not hasattr(model, "rtpurbo")
