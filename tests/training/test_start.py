"""The SVD start is the best low-rank estimate, in the sense it claims."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import IndexerSettings
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparsify import headwise_modules, indexer_weights
from rtpurbo.training.start import low_rank_projections, start_indexers
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


def test_the_data_matters(states):
    white = torch.eye(FEATURES, dtype=torch.float64)
    informed = squared_error(states, *low_rank_projections(*moments(states), SCALING, RANK))
    blind = squared_error(states, *low_rank_projections(white, white, SCALING, RANK))
    assert informed < 0.7 * blind


def test_more_dimensions_than_features_leaves_the_rest_zero(states):
    query, key = low_rank_projections(*moments(states), SCALING, FEATURES + 2)
    assert query.shape == key.shape == (FEATURES + 2, FEATURES)
    assert not query[FEATURES:].any()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weight_start_is_exact_for_white_inputs_at_full_rank(family):
    model = tiny_model(family)
    config = sparse_config(model, index_space="pre_rope")
    make_sparse(
        model, replace(config, indexer=IndexerSettings(index_dim=8, index_space="pre_rope"))
    )
    start_indexers(model, "weight", [])
    for module in headwise_modules(model):
        for query, key in zip(module.indexer.query_weight, module.indexer.key_weight, strict=True):
            expected = module.scaling * torch.eye(8)
            torch.testing.assert_close(query.T @ key, expected, rtol=1e-3, atol=1e-4)


def test_weight_start_refuses_normalised_queries():
    model = tiny_model("qwen3")
    make_sparse(model, sparse_config(model))
    with pytest.raises(RTPurboError, match="covariance"):
        start_indexers(model, "weight", [])


def test_random_start_is_seeded():
    model = tiny_model()
    make_sparse(model, sparse_config(model))

    def weights(seed):
        start_indexers(model, "random", [], seed=seed)
        return torch.cat([weight.flatten() for weight in indexer_weights(model).values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
