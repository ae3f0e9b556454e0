"""Every policy makes the model that its description promises."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.evaluation.policies import POLICIES, BudgetPolicy, Source
from rtpurbo.models.artifact import load
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from tests.evaluation.policies.support import random_queries

ROOT = Path(__file__).parents[3]
LENGTH = 320


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
        "rtpurbo-paper",
        "rtpurbo-residual",
        "rtpurbo-sparse-prefill",
        "rtpurbo-float8-index",
        "rtpurbo-before-stage2",
        "dense-heads",
        "quest",
        "top-k",
        "oracle-top-p",
        "local-only",
        "random-heads",
    ]
    assert all(policy.description for policy in POLICIES.values())


def test_the_documentation_and_the_help_know_every_policy():
    for page in ("docs/evaluation.md", "src/rtpurbo/cli/evaluate.py"):
        text = (ROOT / page).read_text(encoding="utf-8")
        missing = [name for name in POLICIES if not re.search(rf"\b{name}\b", text)]
        assert missing == [], page


def test_policies_with_a_budget():
    budgeted = [name for name, policy in POLICIES.items() if isinstance(policy, BudgetPolicy)]
    assert budgeted == ["quest", "top-k"]


def test_only_the_full_model_is_dense(models):
    assert [name for name, model in models.items() if not is_sparse(model)] == ["full"]


def test_only_policies_without_stage_2_have_the_dense_weights(models):
    without = [
        name for name, model in models.items() if torch.equal(weight(model), weight(models["full"]))
    ]
    assert without == ["full", "rtpurbo-before-stage2"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rtpurbo-paper", {"reading": "paper", "min_tokens": 0}),
        ("rtpurbo-residual", {"reading": "residual", "min_tokens": 1}),
        ("rtpurbo-sparse-prefill", {"prefill_mode": "row_share"}),
        ("rtpurbo-float8-index", {"index_storage": "float8"}),
        ("dense-heads", {"top_p": 1.0}),
        ("random-heads", {"top_p": 1.0}),
    ],
)
def test_rules_are_changed_in_every_layer(models, name, changes):
    expected = vars(rule(models["rtpurbo"])) | changes
    assert vars(rule(models[name])) == expected
    assert all(module.rule == rule(models[name]) for module in headwise_modules(models[name]))


def test_selectors_of_the_policies(models):
    for policy in POLICIES.values():
        if isinstance(policy, BudgetPolicy):
            policy.set_budget(models[policy.name], 7)
    selecting = [
        name
        for name, model in models.items()
        if is_sparse(model) and all(module.selector for module in headwise_modules(model))
    ]
    assert selecting == ["quest", "top-k", "oracle-top-p"]


def test_policies_of_an_artifact_with_a_top_p_for_each_layer(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "by-layer")
    stored = ArtifactConfig.read(folder)
    replace(stored, config=stored.config.with_rule(layer_top_p=(0.01, 0.99))).write(folder)
    source = Source(folder)
    found = {
        name: [layer.rule.top_p for layer in headwise_modules(POLICIES[name].prepare(source)[0])]
        for name in ("rtpurbo", "rtpurbo-paper", "dense-heads", "random-heads")
    }
    assert found["rtpurbo"] == found["rtpurbo-paper"] == [0.01, 0.99]
    assert found["dense-heads"] == found["random-heads"] == [1.0, 1.0]
    model, _ = POLICIES["oracle-top-p"].prepare(source)
    queries = random_queries(31, 111)
    read = [int(layer.selector(queries).sum()) for layer in headwise_modules(model)]
    assert read[0] < read[1]


def test_controls_have_their_heads(models):
    expected = models["rtpurbo"].rtpurbo_config.head_map
    local = models["local-only"].rtpurbo_config
    assert local.head_map.num_retrieval_heads == 0
    assert local.attention == rule(models["rtpurbo"])
    drawn = models["random-heads"].rtpurbo_config
    assert drawn.head_map.num_retrieval_heads == expected.num_retrieval_heads
    assert drawn.attention.top_p == 1


def test_cache_sizes_equal_their_tensors(models):
    weights = {name: policy.kv_bytes(models[name], LENGTH) for name, policy in POLICIES.items()}
    layers, heads, index_dim, head_dim, key_value_heads, size = 2, 2, 4, 8, 1, 4
    index = layers * heads * index_dim * LENGTH * size
    without = weights["rtpurbo"] - index
    assert weights["rtpurbo"] == cache_bytes(models["rtpurbo"], LENGTH) == weights["top-k"]
    assert weights["dense-heads"] == weights["oracle-top-p"] == without
    # Two keys for each of 20 pages.
    assert weights["quest"] == without + layers * key_value_heads * 2 * 20 * head_dim * size
    assert weights["local-only"] < without < weights["full"]


def test_another_place_of_the_base_model(tiny_artifact, tiny_base):
    model, _ = Source(tiny_artifact, base_model=str(tiny_base)).sparse()
    expected, _ = load(tiny_artifact)
    assert torch.equal(weight(model), weight(expected))
