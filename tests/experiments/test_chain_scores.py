"""Heads that follow chains, on documents whose places are known and a model whose head is known."""

import random
import re

import pytest
import torch
from ablations.chain_scores import chain_scores, make_chain_document
from ablations.head_choice import in_turn

from rtpurbo.data.prompts import decode
from rtpurbo.errors import RTPurboError
from tests.calibration.test_calibrate import copying_model
from tests.data.test_needles import corpus
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("number", range(4))
def test_places_of_a_document_are_what_they_say(number):
    tokenizer = tiny_tokenizer()
    document = make_chain_document(tokenizer, corpus(), 1500, random.Random(number))

    def text(indices):
        return decode(tokenizer, [document.input_ids[index] for index in indices])

    hidden = re.findall(r"VAR [A-Z]{5} = (?:VAR [A-Z]{5}|\d{5})", text(document.hidden))
    values = [line[-5:] for line in hidden if line[-1].isdigit()]
    assert len(hidden) >= 2
    assert text(document.rows["assignment"]).count("= VAR") == len(hidden) - len(values)
    assert any(value in text(document.rows["value"]) for value in values)
    # Rows of the answer are those that predict it.
    answer = text(index + 1 for index in document.rows["answer"]).split()
    assert answer
    assert all(any(f"VAR {name} =" in line for line in hidden) for name in answer)
    assert max(document.hidden) < min(document.rows["value"]) < min(document.rows["answer"])


def test_the_head_that_looks_back_scores_most():
    scores = chain_scores(copying_model(), tiny_tokenizer(), corpus(), 1000, 2)
    found = torch.tensor(scores)
    assert found.flatten().argmax() == found.shape[1] + 3
    assert found.min() >= 0
    assert found.max() <= 1
    assert found[1, 3] > 2 * found[0].max()
    assert scores == chain_scores(copying_model(), tiny_tokenizer(), corpus(), 1000, 2)
    assert scores != chain_scores(copying_model(), tiny_tokenizer(), corpus(), 1000, 2, seed=1)


def test_tokenizers_that_do_not_tell_places_are_refused():
    tokenizer = tiny_tokenizer()
    encode = type(tokenizer).__call__

    class Other(type(tokenizer)):
        def __call__(self, text, **options):
            found = encode(self, text, **options)
            if options.get("return_offsets_mapping"):
                found["input_ids"] = [0]
            return found

    tokenizer.__class__ = Other
    with pytest.raises(RTPurboError, match="reads the text of its own tokens as other ones"):
        make_chain_document(tokenizer, corpus(), 1500, random.Random(0))


def test_two_rankings_take_turns():
    first = [[0.9, 0.5], None, [0.8, 0.1]]
    second = [[0.1, 0.2], None, [0.3, 0.9]]
    taken = in_turn(first, second)
    assert taken[1] is None
    order = sorted(((layer, head) for layer in (0, 2) for head in (0, 1)),
                   key=lambda at: -taken[at[0]][at[1]])  # fmt: skip
    # The best of the first, the best of the second; then (2, 0) is second in both, and so on.
    assert order == [(0, 0), (2, 1), (2, 0), (0, 1)]
