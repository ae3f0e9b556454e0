"""Heads that follow chains, on documents whose places are known and a model whose head is known."""

import random
import re

import pytest
import torch

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.calibration.chains import chain_scores, make_chain_document
from rtpurbo.data.long_range import NOISE, LongRangeMix
from rtpurbo.data.prompts import decode
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import CalibrationSettings
from tests.calibration.test_calibrate import copying_model
from tests.data.test_needles import corpus
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("number", range(12))
def test_spans_of_a_document_match_its_tokens(number):
    tokenizer = tiny_tokenizer()
    document = make_chain_document(tokenizer, corpus(), 1500, random.Random(number))
    mix = LongRangeMix(tokenizer, corpus())
    sequence = mix.chains(1500, random.Random(number), NOISE, most_questions=1)
    assert document.input_ids == sequence.conversation.input_ids

    def text(indices):
        return decode(tokenizer, [document.input_ids[index] for index in indices])

    hidden = [each for each in sequence.assignments if each in text(document.hidden)]
    assert len(hidden) == len(sequence.assignments) >= 2
    copies = text(document.queries["assignment"])
    assert [each for each in hidden if each in copies] == list(sequence.copies)
    # Tokens may reach over the edges of what they cover.
    assert len(text(document.hidden)) <= sum(len(each) + 4 for each in hidden)
    [value] = sequence.values
    assert text(document.queries["value"]).strip(' .\n"') == value
    # Rows of the answer are those that predict it.
    answer = re.findall(r"[A-Za-z]\w+", text(index + 1 for index in document.queries["answer"]))
    names = [name for name in answer if name != "and"]
    assert names
    assert all(any(name in line for line in hidden) for name in names)
    assert max(document.hidden) < min(document.queries["value"]) < min(document.queries["answer"])


def test_the_head_that_looks_back_scores_most():
    document = make_chain_document(tiny_tokenizer(), corpus(), 1000, random.Random(0))
    scores = chain_scores(copying_model(), document)
    found = torch.stack([scores[layer] for layer in sorted(scores)])
    assert found.flatten().argmax() == found.shape[1] + 3
    assert found.min() >= 0
    assert found.max() <= 1
    assert found[1, 3] > 2 * found[0].max()


@pytest.mark.parametrize("ranking", ["variable_tracking", "interleaved"])
def test_heads_are_chosen_by_chains(ranking):
    settings = CalibrationSettings(length=1000, num_documents=2, count=1, ranking=ranking)

    def run(seed):
        return calibrate(copying_model(), tiny_tokenizer(), corpus(), settings, seed=seed)

    found = run(0)
    assert found.head_map.retrieval_heads == ((), (3,))
    assert found.stability.num_documents == 2
    assert run(0) == found
    if ranking == "variable_tracking":  # places in a ranking may stay, scores do not
        assert run(1).head_map.scores != found.head_map.scores


def test_tokenizers_without_offsets_are_refused():
    tokenizer = tiny_tokenizer()
    encode = type(tokenizer).__call__

    class Other(type(tokenizer)):
        def __call__(self, text, **options):
            found = encode(self, text, **options)
            if options.get("return_offsets_mapping"):
                found["input_ids"] = [0]
            return found

    tokenizer.__class__ = Other
    with pytest.raises(RTPurboError, match="encodes the text of its own tokens differently"):
        make_chain_document(tokenizer, corpus(), 1500, random.Random(0))
