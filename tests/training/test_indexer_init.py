"""Initialisation of the indexers: the SVD is the best low-rank estimate."""

import pytest
import torch

from rtpurbo.models.sparse_layers import indexer_weights
from rtpurbo.training.indexer_init import init_indexers, low_rank_projections
from tests.tiny_models import make_sparse, sparse_config, tiny_model

FEATURES, RANK, SCALING = 12, 3, 0.3


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    samples = torch.randn(2, 4000, FEATURES, generator=generator, dtype=torch.float64)
    return samples @ mixing


def squared_error(states, query_weight, key_weight):
    """Mean squared error of the logits over all pairs of the samples, by their moments."""
    query_moment, key_moment = (part.T @ part / part.shape[0] for part in states)
    difference = SCALING * torch.eye(FEATURES, dtype=torch.float64) - query_weight.T @ key_weight
    return float(torch.trace(query_moment @ difference @ key_moment @ difference.T))


def moments(states):
    return [part.T @ part / part.shape[0] for part in states]


def test_full_rank_is_exact(states):
    query, key = low_rank_projections(*moments(states), SCALING, FEATURES)
    torch.testing.assert_close(query.T @ key, SCALING * torch.eye(FEATURES, dtype=torch.float64))


def test_no_small_change_improves_it(states):
    query, key = low_rank_projections(*moments(states), SCALING, RANK)
    best = squared_error(states, query, key)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        change = 1e-2 * torch.randn(2, RANK, FEATURES, generator=generator, dtype=torch.float64)
        assert squared_error(states, query + change[0], key + change[1]) > best


def test_projections_depend_on_the_data(states):
    white = torch.eye(FEATURES, dtype=torch.float64)
    informed = squared_error(states, *low_rank_projections(*moments(states), SCALING, RANK))
    blind = squared_error(states, *low_rank_projections(white, white, SCALING, RANK))
    assert informed < 0.7 * blind


def test_index_dimensions_beyond_the_features_are_zero(states):
    query, key = low_rank_projections(*moments(states), SCALING, FEATURES + 2)
    assert query.shape == key.shape == (FEATURES + 2, FEATURES)
    assert not query[FEATURES:].any()


def test_one_head_alone_gets_the_truncated_svd_of_its_own_logits(states):
    query_moment, key_moment = moments(states)
    roots = [torch.linalg.cholesky(moment) for moment in (query_moment, key_moment)]
    left, singular, right = torch.linalg.svd(SCALING * roots[0].T @ roots[1])
    whitened = left[:, :RANK] * singular[:RANK] @ right[:RANK]
    expected = torch.linalg.solve(roots[0].T, whitened) @ torch.linalg.inv(roots[1])
    query, key = low_rank_projections(query_moment, key_moment, SCALING, RANK)
    torch.testing.assert_close(query.T @ key, expected)


def grouped_moments(heads):
    """Moments of some heads' queries, of unequal sizes, and of the keys that they share."""
    generator = torch.Generator().manual_seed(heads)
    mixing = torch.randn(heads + 1, FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    mixing *= torch.linspace(0.3, 2, heads + 1)[:, None, None]
    both = mixing @ mixing.transpose(-1, -2)
    return both[:-1], both[-1]


def group_error(query_moments, key_moment, query_weights, key_weight):
    """Mean squared errors of the logits, added up over the heads."""
    error = 0.0
    for moment, weight in zip(query_moments, query_weights, strict=True):
        difference = SCALING * torch.eye(FEATURES, dtype=torch.float64) - weight.T @ key_weight
        error += float(torch.trace(moment @ difference @ key_moment @ difference.T))
    return error


def best_query_weight(query_moment, key_moment, key_weight):
    """Minimises the error of a head's logits given the key weight, by the normal equations."""
    gram = key_weight @ key_moment @ key_weight.T
    target = SCALING * key_weight @ key_moment @ query_moment
    return torch.linalg.solve(gram, target) @ torch.linalg.inv(query_moment)


@pytest.mark.parametrize("heads", [2, 3, 6])
def test_a_shared_key_is_at_least_as_good_as_the_key_of_any_of_its_heads(heads):
    query_moments, key_moment = grouped_moments(heads)
    query_weight, key_weight = low_rank_projections(query_moments.sum(0), key_moment, SCALING, RANK)
    shared = group_error(query_moments, key_moment, query_weight.expand(heads, -1, -1), key_weight)
    single = []
    for moment in query_moments:
        _, own = low_rank_projections(moment, key_moment, SCALING, RANK)
        weights = torch.stack([best_query_weight(each, key_moment, own) for each in query_moments])
        single.append(group_error(query_moments, key_moment, weights, own))
    assert shared < min(single)


@pytest.mark.parametrize("heads", [1, 3])
def test_no_small_change_of_any_head_improves_shared_projections(heads):
    query_moments, key_moment = grouped_moments(heads)
    query_weight, key_weight = low_rank_projections(query_moments.sum(0), key_moment, SCALING, RANK)
    query_weights = query_weight.expand(heads, -1, -1)
    best = group_error(query_moments, key_moment, query_weights, key_weight)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        change = torch.randn(heads + 1, RANK, FEATURES, generator=generator, dtype=torch.float64)
        changed = query_weights + 1e-2 * change[:-1], key_weight + 1e-2 * change[-1]
        assert group_error(query_moments, key_moment, *changed) > best


def test_heads_of_a_group_are_initialised_with_one_key():
    """Two heads share a KV head; the third has one of its own, and starts as without sharing."""
    ids = torch.randint(2, 64, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    weights = {}
    for shared_keys in (False, True):
        model = tiny_model()
        make_sparse(model, sparse_config(model, (0, 1, 4), shared_keys=shared_keys))
        init_indexers(model, [ids, ids[:30]])
        weights[shared_keys] = indexer_weights(model)
    for layer in (0, 1):
        query, key = (f"layers.{layer}.indexer.{side}_weight" for side in ("query", "key"))
        own, shared = weights[False], weights[True]
        assert shared[key].shape[0] == 2
        # The signs of singular vectors are anyone's.
        torch.testing.assert_close(
            shared[query][2].T @ shared[key][1], own[query][2].T @ own[key][2]
        )
        assert torch.equal(shared[query][0], shared[query][1])
