"""Calibration as a whole, on a model whose retrieval head is known."""

import pytest
import torch

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import CalibrationSettings
from tests.calibration.silent import silent_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def corpus():
    return load_texts(None, "train")


def copying_model():
    """Head 3 of layer 1 attends to equal tokens; every other head of the model to all alike."""
    model = silent_model()
    attention = model.model.layers[1].self_attn
    size = attention.head_dim
    head, key_value_head = 3, 1
    attention.q_proj.weight.data[head * size : (head + 1) * size] = (
        3 * attention.k_proj.weight.data[key_value_head * size : (key_value_head + 1) * size]
    )
    return model


def test_finds_the_head_that_retrieves(corpus):
    found = calibrate(
        copying_model(),
        tiny_tokenizer(),
        corpus,
        CalibrationSettings(length=512, num_documents=2, count=1),
    )
    assert found.head_map.retrieval_heads == ((), (3,))
    assert found.stability.num_documents == 2
    scores = torch.tensor(found.head_map.scores)
    assert scores[1, 3] > 0.05
    assert scores[0].abs().max() < 0.02


def test_the_same_seed_finds_the_same(corpus):
    def run(seed):
        settings = CalibrationSettings(length=384, num_documents=1)
        model = tiny_model(vocab_size=512, max_position_embeddings=512)
        return calibrate(model, tiny_tokenizer(), corpus, settings, seed=seed).head_map.scores

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_document_longer_than_the_context(corpus):
    with pytest.raises(RTPurboError, match="do not fit the model's context of 256"):
        calibrate(tiny_model(), tiny_tokenizer(), corpus, CalibrationSettings(length=512))
