import pytest
import torch

from rtpurbo.config import HeadMap
from rtpurbo.evaluation.policies import POLICIES, Source, random_head_map
from rtpurbo.models.artifact import load
from rtpurbo.models.sparsify import is_sparse


@pytest.fixture(scope="module")
def models(tiny_artifact):
    return {name: policy.prepare(Source(tiny_artifact))[0] for name, policy in POLICIES.items()}


def rule(model):
    return model.rtpurbo_config.attention


def weight(model):
    return model.base_model.layers[0].self_attn.q_proj.weight


def test_display_order():
    assert list(POLICIES) == [
        "full",
        "rtpurbo",
        "rtpurbo-sparse-prefill",
        "rtpurbo-before-stage2",
        "local-only",
        "random-heads",
    ]
    assert all(policy.description for policy in POLICIES.values())


def test_only_the_full_model_is_dense(models):
    assert [name for name, model in models.items() if not is_sparse(model)] == ["full"]


def test_stage2_is_where_it_should_be(models):
    with_stage2 = [
        name
        for name, model in models.items()
        if not torch.equal(weight(model), weight(models["full"]))
    ]
    assert with_stage2 == ["rtpurbo", "rtpurbo-sparse-prefill", "local-only", "random-heads"]


def test_sparse_prefill_changes_the_rule_of_every_layer(models):
    model = models["rtpurbo-sparse-prefill"]
    assert rule(model).prefill_mode == "row_share"
    assert rule(models["rtpurbo"]).prefill_mode == "dense"
    for layer in model.base_model.layers:
        assert layer.self_attn.rule == rule(model)


def test_controls_have_their_heads(models):
    expected = models["rtpurbo"].rtpurbo_config.head_map
    local = models["local-only"].rtpurbo_config
    assert local.head_map.num_retrieval_heads == 0
    assert local.attention == rule(models["rtpurbo"])
    drawn = models["random-heads"].rtpurbo_config
    assert drawn.head_map.num_retrieval_heads == expected.num_retrieval_heads
    assert drawn.attention.top_p == 1


def test_random_heads_stay_in_the_layers_of_the_retrieval_heads():
    head_map = HeadMap((None, (0, 5), (), (2,)), 8, 4)
    drawn = [random_head_map(head_map, seed) for seed in range(20)]
    for each in drawn:
        assert each.num_retrieval_heads == 3
        assert each.retrieval_heads[0] is None
        assert each.retrieval_heads[2] == ()
    assert drawn[0] == random_head_map(head_map, 0)
    assert len(set(drawn)) > 10


def test_another_place_of_the_base_model(tiny_artifact, tiny_base):
    model, _ = Source(tiny_artifact, base_model=str(tiny_base)).sparse()
    expected, _ = load(tiny_artifact)
    assert torch.equal(weight(model), weight(expected))
