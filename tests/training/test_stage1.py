"""Stage 1 from settings to figures, with states that are kept and with none."""

import math

import pytest
import torch

from rtpurbo.benchmarks.geometries import draw_indexers
from rtpurbo.config import AttentionRule, HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.data.texts import load_texts
from rtpurbo.models.sparse_layers import headwise_modules, indexer_weights
from rtpurbo.models.sparsify import sparsify
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.stage1 import train_indexers
from tests.tiny_models import HEADS, KEY_VALUE_HEADS, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(autouse=True)
def random_init(monkeypatch):
    """Random weights at first, which leave more to learn than those from data."""
    monkeypatch.setattr(
        "rtpurbo.training.stage1.init_indexers", lambda model, samples: draw_indexers(model)
    )


def sparse(dtype=torch.float32):
    model = tiny_model(vocab_size=512, max_position_embeddings=1024).to(dtype)
    head_map = HeadMap.uniform((1, 4), [True, True], HEADS, KEY_VALUE_HEADS)
    rule = AttentionRule(num_sink_tokens=2, sliding_window=16, min_tokens=4, block_size=16)
    return sparsify(model, RTPurboConfig(head_map, rule, IndexerSettings(index_dim=4)))


def train(model, log=None, **settings):
    settings = {
        "steps": 6, "lengths": (96, 128), "init_sequences": 1, "warmup_steps": 0,
        "mixture": {}, "probe_sequences": 1, "probe_every": 3, "queries_per_step": None,
        "learning_rate": 0.02, **settings,
    }  # fmt: skip
    corpus = load_texts(None)
    return train_indexers(
        model, tiny_tokenizer(), corpus, corpus, IndexerTrainingSettings(**settings), log=log
    )


def losses_of(path):
    return [entry["loss"] for entry in TrainingLog(path).entries()]


@pytest.mark.parametrize("queries_per_step", [None, 20])
def test_layerwise_training_equals_training_on_kept_states(tmp_path, monkeypatch, queries_per_step):
    passing, kept = sparse(), sparse()
    options = {
        "queries_per_step": queries_per_step,
        "sequences_per_step": 2,
        "steps_per_sequence": 1,
    }
    figures = train(passing, TrainingLog(tmp_path / "passing"), **options)
    monkeypatch.setattr("rtpurbo.training.stage1.keeps_states", lambda settings: True)
    expected = train(kept, TrainingLog(tmp_path / "kept"), **options)
    assert losses_of(tmp_path / "passing") == pytest.approx(losses_of(tmp_path / "kept"), rel=1e-3)
    assert figures["recall"] == pytest.approx(expected["recall"], abs=1e-2)
    assert losses_of(tmp_path / "passing")[-1] < losses_of(tmp_path / "passing")[0]


def test_indexers_of_a_half_precision_model_train_in_float32():
    model = sparse(torch.bfloat16)
    figures = train(model, steps=2, steps_per_sequence=1)
    assert math.isfinite(figures["divergence"])
    weights = [module.indexer.query_weight for module in headwise_modules(model)]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(weight.any() for weight in indexer_weights(model).values())
