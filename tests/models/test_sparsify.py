"""Making a model sparse, switching it, watching it, and what is refused."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparse_layers import headwise_modules, indexer_weights, is_sparse, load_indexers
from rtpurbo.models.sparsify import empty_head_map, observing, restore, runtime, sparsify
from tests.tiny_models import (
    HEADS,
    KEY_VALUE_HEADS,
    LENGTH,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)


def test_a_sparse_layer_hangs_on_each_module_and_leaves_nothing_behind():
    model = tiny_model()
    originals = [layer.self_attn for layer in model.model.layers]
    implementation = model.config._attn_implementation
    assert not is_sparse(model)
    assert sparsify(model, sparse_config(model)) is model
    assert is_sparse(model)
    assert [layer.self_attn for layer in model.model.layers] == originals
    assert [layer.module for layer in headwise_modules(model)] == originals
    assert restore(model) is model
    assert not is_sparse(model)
    assert [layer.self_attn for layer in model.model.layers] == originals
    assert model.config._attn_implementation == implementation
    for original in originals:
        assert not original._forward_pre_hooks
        assert not {"_rtpurbo", "forward"} & set(vars(original))
        assert not hasattr(original, "indexer")
    assert "_prepare_cache_for_generation" not in vars(model)
    assert not model.base_model._forward_pre_hooks


def test_sparsifying_again_replaces_the_configuration():
    model, (ids, mask) = tiny_model(), padded_batch()
    expected = logits_of(model, ids, mask)
    make_sparse(model, sparse_config(model, (0,)))
    make_sparse(model, sparse_config(model, (1, 2)))
    assert [module.retrieval_heads for module in headwise_modules(model)] == [[1, 2]] * 2
    restore(model)
    assert torch.equal(logits_of(model, ids, mask), expected)


def test_a_refused_configuration_leaves_a_sparse_model_as_it_was():
    model, (ids, mask) = sparse_model(), padded_batch()
    expected = logits_of(model, ids, mask)
    with pytest.raises(RTPurboError, match="head map"):
        sparsify(model, RTPurboConfig(HeadMap(((0,),) * 3, HEADS, KEY_VALUE_HEADS)))
    assert torch.equal(logits_of(model, ids, mask), expected)


def test_layers_may_have_different_heads():
    model = tiny_model()
    head_map = HeadMap(((0, 3), ()), HEADS, KEY_VALUE_HEADS)
    sparsify(model, replace(sparse_config(model), head_map=head_map))
    first, second = headwise_modules(model)
    assert (first.retrieval_heads, second.retrieval_heads) == ([0, 3], [])
    assert hasattr(first.module, "indexer")
    assert not hasattr(second.module, "indexer")
    assert logits_of(model, *padded_batch()).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_kept(training):
    model = tiny_model().train(training)
    sparsify(model, sparse_config(model))
    assert all(module.training == training for module in model.modules())
    model.train(not training)
    restore(model)
    assert all(module.training != training for module in model.modules())


def test_indexers_take_the_dtype_of_the_model():
    model = make_sparse(tiny_model().to(torch.bfloat16), sparse_config(tiny_model()))
    assert all(m.indexer.query_weight.dtype == torch.bfloat16 for m in headwise_modules(model))
    assert logits_of(model, *padded_batch(), [40, 1, 1, 2]).isfinite().all()
    assert all(value.dtype == torch.float32 for value in indexer_weights(model).values())


def test_indexer_weights_round_trip():
    source, target = (sparse_model(dtype=torch.float32) for _ in range(2))
    for module in headwise_modules(target):
        module.indexer.query_weight.data.zero_()
    weights = indexer_weights(source)
    assert set(weights) == {
        f"layers.{layer}.indexer.{side}_weight" for layer in (0, 1) for side in ("query", "key")
    }
    assert not torch.equal(logits_of(target, *padded_batch()), logits_of(source, *padded_batch()))
    load_indexers(target, weights)
    assert torch.equal(logits_of(target, *padded_batch()), logits_of(source, *padded_batch()))


def test_indexer_weights_are_copies():
    model = sparse_model()
    weights = indexer_weights(model)
    for value in weights.values():
        value.zero_()
    assert all(value.any() for value in indexer_weights(model).values())


NAME = "layers.1.indexer.key_weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.update({NAME: weights[NAME][:, :, :-1]}), r"is \(2, 4, 3\)"),
        (lambda weights: weights.pop(NAME), "is missing, expected"),
        (lambda weights: weights.update({"layers.7.x": torch.ones(3)}), "expected nothing"),
    ],
)
def test_indexer_weights_that_do_not_fit_are_refused(spoil, message):
    model = sparse_model()
    weights = indexer_weights(model)
    before = logits_of(model, *padded_batch())
    spoil(weights)
    for value in weights.values():
        value.zero_()
    with pytest.raises(RTPurboError, match=message):
        load_indexers(model, weights)
    assert torch.equal(logits_of(model, *padded_batch()), before)


def test_indexers_with_shared_keys_do_not_fit_a_model_with_own_ones():
    source, target = (sparse_model(heads=(0, 1, 4)) for _ in range(2))
    config = target.rtpurbo_config
    sparsify(target, replace(config, indexer=replace(config.indexer, shared_keys=True)))
    with pytest.raises(RTPurboError, match=r"key_weight' is \(3, 4, \d\), expected \(2, 4, \d\)"):
        load_indexers(target, indexer_weights(source))


@pytest.mark.parametrize(
    "head_map",
    [
        HeadMap(((0,),) * 3, HEADS, KEY_VALUE_HEADS),
        HeadMap(((0,),) * 2, 8, KEY_VALUE_HEADS),
        HeadMap(((0,),) * 2, HEADS, HEADS),
        HeadMap(((0,), None), HEADS, KEY_VALUE_HEADS),
    ],
    ids=["layers", "heads", "key-value heads", "left out"],
)
def test_the_head_map_of_another_model_is_refused(head_map):
    model = tiny_model()
    with pytest.raises(RTPurboError, match="head map"):
        sparsify(model, RTPurboConfig(head_map))
    assert not is_sparse(model)


def test_a_head_map_must_leave_windowed_layers_alone():
    model = tiny_model("gemma3_text")
    with pytest.raises(RTPurboError, match="full attention"):
        sparsify(model, RTPurboConfig(HeadMap(((0,),) * 3, HEADS, KEY_VALUE_HEADS)))


@pytest.mark.parametrize("act", [restore, headwise_modules, indexer_weights])
def test_a_dense_model_is_named_as_such(act):
    with pytest.raises(RTPurboError, match="the model is dense"):
        act(tiny_model())


def test_using_a_rule_for_a_while():
    model, (ids, mask) = sparse_model(), padded_batch()
    rule, before = model.rtpurbo_config.attention, logits_of(model, ids, mask)
    with runtime(model).rule(top_p=1.0):
        assert model.rtpurbo_config.attention == replace(rule, top_p=1.0)
        assert not torch.equal(logits_of(model, ids, mask), before)
    assert model.rtpurbo_config.attention == rule
    assert torch.equal(logits_of(model, ids, mask), before)
    with pytest.raises(KeyError), runtime(model).rule(top_p=1.0):
        raise KeyError
    assert torch.equal(logits_of(model, ids, mask), before)


def test_counting_reads():
    model, (ids, mask) = sparse_model(), padded_batch()
    shares = {}
    for top_p in (0.3, 0.9, 1.0):
        with runtime(model).rule(top_p=top_p), model.rtpurbo.counting() as statistics:
            logits_of(model, ids, mask)
        shares[top_p] = statistics.share_read
        lengths = mask.sum(1).tolist()
        far = sum(max(0, row - 8 - 2 + 1) for length in lengths for row in range(length))
        assert statistics.far_keys == far * 2 * 2  # retrieval heads x layers
    assert 0 < shares[0.3] < shares[0.9] < shares[1.0] == 1
    counted = statistics.queries
    logits_of(model, ids, mask)
    assert statistics.queries == counted


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_observation_does_not_change_the_logits(sparse, padded):
    model = tiny_model()
    ids, mask = padded_batch() if padded else padded_batch((0, 0))
    expected = logits_of(model, ids, mask)
    unobserved = expected
    if sparse:
        make_sparse(model, sparse_config(model))
        unobserved = logits_of(model, ids, mask)
    views = []
    with observing(model, views.append):
        observed = logits_of(model, ids, mask)
    torch.testing.assert_close(observed[mask.bool()], expected[mask.bool()])
    assert [view.layer for view in views] == [0, 1]
    assert views[0].queries.shape == (len(ids), HEADS, LENGTH, 8)
    assert is_sparse(model) == sparse
    assert torch.equal(logits_of(model, ids, mask), unobserved)
    assert len(views) == 2


def test_an_empty_head_map_names_no_heads():
    head_map = empty_head_map(tiny_model("gemma3_text"))
    assert head_map.retrieval_heads == (None, (), None)


def test_an_unset_wavelength_becomes_the_context_length():
    model = tiny_model()
    config = sparse_config(model)
    assert config.indexer.min_wavelength is None
    sparsify(model, config)
    assert model.rtpurbo_config.indexer.min_wavelength == model.config.max_position_embeddings
    fixed = replace(config, indexer=IndexerSettings(4, min_wavelength=50.0))
    sparsify(model, fixed)
    assert model.rtpurbo_config == fixed


def test_heads_divided_among_processes_are_refused():
    model = tiny_model()
    model._tp_size = 2
    with pytest.raises(RTPurboError, match="load it without tp_plan"):
        sparsify(model, sparse_config(model))
