"""The attention function: masks as positions, observations, and a whole layer against the fp64 oracle."""

import pytest
import torch
from transformers import DynamicCache

from rtpurbo.errors import RTPurboError
from rtpurbo.models.attention import key_positions_as_mask
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing
from tests import oracles
from tests.models.zoo.configurations import EQUAL, HEADS_BY_LAYER
from tests.oracles import Problem, left_padded_positions
from tests.tiny_models import (
    FAMILIES,
    LENGTH,
    PADDING,
    any_model,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)


def as_mask(attention_mask, q_length, **options):
    kv_length = LENGTH if attention_mask is None else attention_mask.shape[1]
    return key_positions_as_mask(
        batch_size=3,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        config=tiny_model("gemma3_text").config,
        **options,
    )


@pytest.mark.parametrize("q_length", [1, LENGTH])
def test_a_padding_mask_becomes_positions(q_length):
    _, mask = padded_batch()
    assert torch.equal(as_mask(mask, q_length), left_padded_positions(PADDING, LENGTH))
    assert torch.equal(as_mask(mask.bool(), q_length), left_padded_positions(PADDING, LENGTH))


def test_no_padding_needs_no_mask():
    assert as_mask(None, LENGTH) is None
    assert as_mask(None, LENGTH, local_size=256) is None


def test_a_windowed_layer_gets_positions_with_its_window():
    _, mask = padded_batch()
    given = as_mask(mask.bool(), LENGTH, local_size=8)
    assert torch.equal(given.positions, left_padded_positions(PADDING, LENGTH))
    assert given.window == 8
    assert as_mask(mask, LENGTH, local_size=256).shape == mask.shape


@pytest.mark.parametrize("changed", [{"use_vmap": True}, {"allow_is_causal_skip": False}])
def test_a_windowed_layer_with_a_changed_mask_gets_the_mask(changed):
    _, mask = padded_batch()
    usual = as_mask(mask.bool(), LENGTH, local_size=8, **changed)
    assert usual.shape[-2:] == (LENGTH, LENGTH)


def layer_problem(model, layer, ids, mask):
    """A layer, its inputs on these tokens as a problem for the oracle, and its output."""
    module, seen = headwise_modules(model)[layer], {}
    raw = module.indexer.settings.index_space == "pre_rope"
    forward = module.forward

    def record(queries, keys, values, *rest):
        seen.update(values=values, output=forward(queries, keys, values, *rest))
        return seen["output"]

    def observe(view):
        if view.layer == module.layer_idx:
            states = view.queries, view.keys
            seen.update(view=view, features=[*map(view.undo_rotation, states)] if raw else states)

    module.forward = record
    with observing(model, observe, dense=False):
        logits_of(model, ids, mask)
    del module.forward
    view, (queries, keys) = seen["view"], seen["features"]
    problem = Problem(
        view.queries,
        view.keys,
        seen["values"],
        torch.zeros(*queries.shape[:3], module.indexer.settings.index_dim),
        torch.zeros(*queries.shape[:3], module.indexer.settings.index_dim),
        view.positions,
        view.positions,
        view.scaling,
    ).to(torch.float64)
    kept = module.indexer.feature_dimensions
    full = sorted({int(problem.kv_head_index[head]) for head in module.retrieval_heads})
    for rank, head in enumerate(module.retrieval_heads):
        key_value_head = int(problem.kv_head_index[head])
        shared = module.indexer.settings.shared_keys
        key_rank = full.index(key_value_head) if shared else rank
        for source, target, weight in (
            (queries[:, head], problem.index_queries, module.indexer.query_weight[rank]),
            (keys[:, key_value_head], problem.index_keys, module.indexer.key_weight[key_rank]),
        ):
            target[:, head] = source[..., kept].double() @ weight.double().T
    return module, problem, seen["output"]


def check_layer(model, layer):
    ids, mask = padded_batch()
    module, problem, output = layer_problem(model, layer, ids, mask)
    seen = oracles.headwise_keys(problem, module.rule, module.retrieval_heads)
    expected, _ = oracles.attend(problem, seen)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_oracle(family):
    model = sparse_model(family)
    for layer in range(len(headwise_modules(model))):
        check_layer(model, layer)


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("name", HEADS_BY_LAYER)
def test_layers_with_different_heads_equal_the_oracle(name, shared_keys):
    model_type, changes = EQUAL[name]
    model = any_model(model_type, **changes).double()
    rule = {"prefill_mode": "top_p", "top_p": 0.6}
    make_sparse(model, sparse_config(model, shared_keys=shared_keys, **rule))
    assert not model.rtpurbo_config.head_map.is_uniform
    for layer in range(len(headwise_modules(model))):
        check_layer(model, layer)


@pytest.mark.parametrize("index_space", ["pre_rope", "post_rope", "low_frequency"])
@pytest.mark.parametrize("mode", ["dense", "top_p", "row_share", "row_peak"])
def test_every_index_space_and_prefill_mode_equals_the_oracle(index_space, mode):
    model = tiny_model()
    rule = {"prefill_mode": mode, "top_p": 0.6, "query_block_size": 16}
    make_sparse(model, sparse_config(model, (2, 5), index_space, **rule))
    check_layer(model, 1)


@pytest.mark.parametrize("heads", [(0, 1, 4), range(6), (1, 4)], ids=str)
@pytest.mark.parametrize("mode", ["dense", "top_p", "row_share", "row_peak"])
def test_shared_index_keys_equal_the_oracle(heads, mode):
    model = tiny_model()
    rule = {"prefill_mode": mode, "top_p": 0.6, "query_block_size": 16}
    make_sparse(model, sparse_config(model, heads, shared_keys=True, **rule))
    check_layer(model, 1)


def test_observations_show_states_after_the_rotation_and_how_to_undo_it():
    model, (ids, mask) = sparse_model(), padded_batch()
    projected, seen = {}, []
    for name in ("q_proj", "k_proj"):
        model.model.layers[0].self_attn.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: projected.update({name: output})
        )
    with observing(model, seen.append, dense=False):
        logits_of(model, ids, mask)
    assert [view.layer for view in seen] == [0, 1]
    logits_of(model, ids, mask)
    view, module = seen[0], headwise_modules(model)[0]
    assert torch.equal(view.positions, left_padded_positions(PADDING, LENGTH))
    assert view.scaling == module.scaling
    for name, states in (("q_proj", view.queries), ("k_proj", view.keys)):
        before = projected[name].unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        torch.testing.assert_close(view.undo_rotation(states), before, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(states, before)


def test_documents_in_one_row_are_refused():
    model, (ids, _) = sparse_model(), padded_batch((0,))
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    with pytest.raises(RTPurboError, match="a row of its own"):
        model(ids, position_ids=positions, use_cache=False)


def test_dropout_is_refused():
    model = make_sparse(tiny_model(attention_dropout=0.5), sparse_config(tiny_model())).train()
    with pytest.raises(RTPurboError, match="attention_dropout=0"):
        model(padded_batch()[0])


def test_a_four_dimensional_mask_is_refused():
    model, (ids, _) = sparse_model(), padded_batch()
    mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool)
    with pytest.raises(RTPurboError, match="2D attention mask"):
        model(ids, attention_mask=mask, use_cache=False)


def test_a_foreign_cache_is_refused():
    model, (ids, mask) = sparse_model(), padded_batch()
    with pytest.raises(RTPurboError, match="not a DynamicCache"):
        model(ids, attention_mask=mask, past_key_values=DynamicCache())


def test_dense_observation_takes_no_cache():
    model, (ids, mask) = sparse_model(), padded_batch()
    with (
        observing(model, lambda view: None),
        pytest.raises(RTPurboError, match="use_cache=False"),
    ):
        model(ids, attention_mask=mask, past_key_values=HeadwiseCache(model))


def test_an_unknown_backend_is_refused():
    model, (ids, mask) = sparse_model(), padded_batch()
    for module in headwise_modules(model):
        module.backend = "cuda9"
    with pytest.raises(ValueError, match="cuda9"):
        logits_of(model, ids, mask)


def test_gradients_reach_the_projections_and_not_the_indexers():
    model, (ids, mask) = sparse_model(), padded_batch()
    model.requires_grad_(True)
    model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    for module in headwise_modules(model):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = module.module.get_submodule(name)
            gradient = projection.weight.grad
            assert gradient.isfinite().all()
            assert gradient.any()
        assert all(parameter.grad is None for parameter in module.indexer.parameters())
