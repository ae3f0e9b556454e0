import json
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo.data.texts import TextCorpus, draw_passages, encode, load_texts
from rtpurbo.errors import RTPurboError
from tests.tiny_tokenizer import tiny_tokenizer

PARAGRAPH = "The quick fox saw the dog. It ran to the hill! Did it come back? Nobody knows.\n\n"


def numbered_document(count, first=0):
    return "".join(f"Sentence number {first + i} stands here.\n\n" for i in range(count))


def test_samples_are_exact_deterministic_and_begin_at_a_sentence():
    tokenizer = tiny_tokenizer()
    corpus = TextCorpus("numbers", (numbered_document(300), numbered_document(300, first=300)))
    samples = [corpus.sample_tokens(tokenizer, 100, random.Random(seed)) for seed in range(20)]
    assert all(len(sample) == 100 for sample in samples)
    assert all(tokenizer.decode(sample).startswith("Sentence number") for sample in samples)
    assert len({tuple(sample) for sample in samples}) > 15
    assert samples[3] == corpus.sample_tokens(tokenizer, 100, random.Random(3))


@given(num_tokens=st.integers(1, 2500), seed=st.integers(0, 99))
def test_any_length_up_to_the_whole_corpus(num_tokens, seed):
    corpus = TextCorpus("numbers", (numbered_document(100), numbered_document(20), PARAGRAPH))
    sample = corpus.sample_tokens(tiny_tokenizer(), num_tokens, random.Random(seed))
    assert len(sample) == num_tokens


def test_text_with_more_characters_per_token_is_long_enough():
    # The first characters make a token each, so the first estimate is far too short.
    corpus = TextCorpus("uneven", ("\u00e9" * 4096 + numbered_document(2000),))
    assert len(corpus.sample_tokens(tiny_tokenizer(), 3000, random.Random(0))) == 3000


def test_consecutive_documents_are_joined():
    tokenizer = tiny_tokenizer()
    corpus = TextCorpus("short", tuple(numbered_document(5, first=5 * i) for i in range(10)))
    text = tokenizer.decode(corpus.sample_tokens(tokenizer, 300, random.Random(0)))
    numbers = [int(word) for word in text.split() if word.isdigit()]
    assert all((b - a) % 50 == 1 for a, b in pairwise(numbers[:-1]))


def test_too_short_a_corpus_says_by_how_much():
    tokenizer = tiny_tokenizer()
    corpus = TextCorpus("fox tales", (PARAGRAPH,))
    with pytest.raises(RTPurboError) as error:
        corpus.sample_tokens(tokenizer, 10_000, random.Random(0))
    actual = len(encode(tokenizer, PARAGRAPH + "\n\n"))
    for part in ("fox tales", f"only {actual} tokens", "10,000"):
        assert part in str(error.value)


def test_built_in_text_is_long_fixed_and_shares_no_paragraph():
    train, held_out = load_texts(None, "train"), load_texts(None, "heldout")
    [train_text], [held_out_text] = train.documents, held_out.documents
    share = len(held_out_text) / (len(held_out_text) + len(train_text))
    assert len(train_text) > 200_000
    assert 0.1 <= share <= 0.25
    assert not set(train_text.split("\n\n")) & set(held_out_text.split("\n\n"))
    assert train == load_texts(None, "train")
    assert not any(set(line) <= set("*=-~") for line in train_text.split("\n") if line)


def test_held_out_part_is_the_last_documents(tmp_path):
    path = tmp_path / "many.jsonl"
    documents = [numbered_document(10, first=10 * i) for i in range(20)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n\n")
    train, held_out = load_texts([str(path)], "train"), load_texts([str(path)], "heldout")
    assert train.documents + held_out.documents == tuple(documents)
    assert len(held_out.documents) == 4


def test_held_out_part_of_one_document_is_its_tail(tmp_path):
    path = tmp_path / "one.md"
    path.write_text(numbered_document(100))
    [train], [held_out] = (load_texts([str(path)], part).documents for part in ("train", "heldout"))
    assert f"{train}\n\n{held_out}" == numbered_document(100)
    assert 0.1 <= len(held_out) / len(train + held_out) <= 0.25


def test_passages_are_different_and_follow_those_found_before():
    corpus = TextCorpus("test", (numbered_document(300),))
    tokenizer = tiny_tokenizer()
    first = draw_passages(tokenizer, corpus, 20, 3, random.Random(0))
    more = draw_passages(tokenizer, corpus, 20, 8, random.Random(1), first)
    assert more[:3] == first
    assert len({tuple(passage) for passage in more}) == 8
    assert {len(passage) for passage in more} == {20}
    alone = TextCorpus("one word", ("word " * 400,))
    with pytest.raises(RTPurboError, match="one word has no 2 different passages of 300 tokens"):
        draw_passages(tokenizer, alone, 300, 2, random.Random(0))
