"""Retrieval scores are what the full attention matrix says they are."""

import random

import pytest
import torch

from rtpurbo.calibration.scores import retrieval_scores
from rtpurbo.data.needles import make_calibration_document
from rtpurbo.data.texts import load_texts
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 384


@pytest.fixture(scope="module")
def document():
    return make_calibration_document(
        tiny_tokenizer(), load_texts(None, "train"), LENGTH, random.Random(0), depth=0.2
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_scores_equal_those_of_the_attention_matrix(family, document):
    model = tiny_model(family, vocab_size=512, max_position_embeddings=512)
    scores = retrieval_scores(model, document)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([document.input_ids]), output_attentions=True).attentions
    early, late = slice(*document.early_span), slice(*document.late_span)
    assert sorted(scores) == ([1] if family == "gemma3_text" else [0, 1])
    for layer, score in scores.items():
        expected = attentions[layer][0, :, late, early].sum(-1).mean(-1)
        chance = (early.stop - early.start) / LENGTH
        torch.testing.assert_close(score, expected - chance, rtol=1e-4, atol=1e-6)


def test_the_model_is_dense_again_afterwards(document):
    model = tiny_model(vocab_size=512, max_position_embeddings=512)
    modules = [layer.self_attn for layer in model.model.layers]
    retrieval_scores(model, document)
    assert [layer.self_attn for layer in model.model.layers] == modules
