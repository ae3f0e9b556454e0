import random
from itertools import islice
from types import SimpleNamespace

import pytest

from rtpurbo.data.words import MORE_ADJECTIVES, MORE_NOUNS, MORE_VERBS, words_of
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.ruler import vocabulary
from rtpurbo.evaluation.ruler.vocabulary import (
    Vocabulary,
    own_vocabulary,
    wonderwords_vocabulary,
)

TRAINED = {word for part in words_of("train") for word in part}


def test_built_in_words_are_many_and_none_is_in_training():
    words = own_vocabulary().words
    assert len(words) > 2000
    assert not set(words) & TRAINED
    assert all(word.isalpha() and word.islower() for word in words)
    every = [*MORE_ADJECTIVES, *MORE_NOUNS, *MORE_VERBS]
    assert len(set(every)) == len(every)
    assert not set(every) & TRAINED


def test_compounds_are_distinct_and_limited():
    compounds = own_vocabulary().compounds(random.Random(0))
    assert len(set(islice(compounds, 20_000))) == 20_000
    small = Vocabulary("few", ("a", "b"), ("c", "d"), ())
    with pytest.raises(RTPurboError, match="few has no more than 2 compounds"):
        list(small.compounds(random.Random(0)))


def test_wonderwords_give_plain_words(monkeypatch):
    trained = min(words_of("train")[1])
    words = {
        "noun": ["teapot", "ATM", "arm-rest", trained],
        "adjective": ["quaint", "ad hoc"],
        "verb": ["sing", "teapot"],
    }
    package = SimpleNamespace(
        RandomWord=lambda: SimpleNamespace(
            filter=lambda include_categories: words[include_categories[0]]
        )
    )
    monkeypatch.setattr(vocabulary, "version", lambda name: "3.0")
    taken = wonderwords_vocabulary(package)
    assert taken == Vocabulary("wonderwords 3.0", ("quaint",), ("teapot",), ("sing", "teapot"))
    assert taken.words == ("quaint", "sing", "teapot")


def test_the_package_itself():
    package = pytest.importorskip("wonderwords")
    assert len(wonderwords_vocabulary(package).words) > 7000
