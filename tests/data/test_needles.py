import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from rtpurbo.data.needles import is_correct, make_calibration_document, make_retrieval_example
from rtpurbo.data.texts import TextCorpus
from rtpurbo.data.words import key_names
from rtpurbo.errors import RTPurboError
from tests.data.readers import read_needles
from tests.tiny_tokenizer import tiny_tokenizer

NEEDLE = re.compile(r"One of the special magic numbers for ([\w-]+) is: (\d{7})\.")


def corpus(num_sentences=4000):
    sentences = (f"The walker came to house {i} and knocked. " for i in range(num_sentences))
    return TextCorpus("walks", ("".join(sentences),))


def tokenizer_with_begin_token():
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@settings(max_examples=40)
@given(
    length=st.integers(900, 4000),
    seed=st.integers(0, 1000),
    num_keys=st.integers(1, 3),
    num_values=st.integers(1, 3),
    has_template=st.booleans(),
)
def test_length_and_content(length, seed, num_keys, num_values, has_template):
    tokenizer = tiny_tokenizer() if has_template else tiny_tokenizer(chat_template=None)
    options = {"num_keys": num_keys, "num_values": num_values}
    example = make_retrieval_example(tokenizer, corpus(), length, random.Random(seed), **options)
    total = len(example.prompt_ids) + len(example.answer_ids)
    assert length - max(16, length // 100) <= total <= length

    text = tokenizer.decode(example.prompt_ids)
    answer = tokenizer.decode(example.answer_ids)
    needles = NEEDLE.findall(text)
    assert len(needles) == num_keys - 1 + num_values
    assert len({number for _, number in needles}) == len(needles)
    assert len({key for key, _ in needles}) == num_keys
    [queried] = set(re.findall(r"numbers? for ([\w-]+) mentioned", text))
    assert queried in key_names("test")
    assert example.answers == [number for key, number in needles if key == queried]
    assert answer.startswith(f" {example.answers[0]}")
    assert is_correct(example, answer)
    assert text.endswith(" is" if num_values == 1 else " are")
    assert ("<|im_start|>assistant\n" in text) == has_template


def test_several_answers_are_listed():
    tokenizer = tiny_tokenizer()
    example = make_retrieval_example(tokenizer, corpus(), 1500, random.Random(0), num_values=3)
    first, second, third = example.answers
    assert tokenizer.decode(example.answer_ids) == f" {first}, {second} and {third}"


def test_same_seed_same_example_and_other_split_other_key():
    tokenizer = tiny_tokenizer()
    make = lambda **options: make_retrieval_example(  # noqa: E731
        tokenizer, corpus(), 1200, random.Random(5), **options
    )
    assert make() == make()
    example = make(split="train", num_keys=3)
    train = tokenizer.decode(example.prompt_ids)
    assert not NEEDLE.search(train)
    needles = read_needles(train.rpartition("\n\n")[0])
    assert len(needles) == 3
    [needle] = [needle for needle in needles if example.answers[0] in needle]
    key = next(each for each in needle if each != example.answers[0])
    assert key in key_names("train")
    assert key in train.rpartition("\n\n")[2]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth(depth):
    example = make_retrieval_example(
        tiny_tokenizer(), corpus(), 4000, random.Random(1), num_keys=2, depth=depth
    )
    text = tiny_tokenizer().decode(example.prompt_ids)
    begin, end = text.index("afterwards.\n\n") + 13, text.index("\n\nWhat")
    [place] = [match.start() for match in NEEDLE.finditer(text) if match[2] == example.answers[0]]
    assert (place - begin) / (end - begin) == pytest.approx(depth, abs=0.05)
    assert text[place - 2 : place] in (". ", "\n\n", "s. ")


@pytest.mark.parametrize("words", ["one two three four ", "onetwothreefour", "\u72d0\u72f8\u3002"])
def test_text_without_sentences_or_words(words):
    corpus = TextCorpus("words", (words * 3000,))
    example = make_retrieval_example(tiny_tokenizer(), corpus, 1500, random.Random(0), depth=0.5)
    text = tiny_tokenizer().decode(example.prompt_ids)
    begin, end = text.index("afterwards.\n\n") + 13, text.index("\n\nWhat")
    assert 0.4 < (NEEDLE.search(text).start() - begin) / (end - begin) < 0.6


def test_every_answer_must_be_in_the_generated_text():
    example = make_retrieval_example(
        tiny_tokenizer(), corpus(), 1200, random.Random(0), num_values=2
    )
    first, second = example.answers
    assert is_correct(example, f"They are:\n- {second}\n- {first}.")
    assert not is_correct(example, f"It is {first}.")
    assert not is_correct(example, f"{first} and 9{second}")


@settings(max_examples=40)
@given(length=st.integers(700, 3000), seed=st.integers(0, 1000), depth=st.floats(0, 0.9))
def test_calibration_document(length, seed, depth):
    tokenizer = tiny_tokenizer()
    rng = random.Random(seed)
    document = make_calibration_document(tokenizer, corpus(), length, rng, depth=depth)
    ids, early, late = document.input_ids, document.early_span, document.late_span
    assert len(ids) == length == late[1]
    assert 0 <= early[0] < early[1] <= late[0]
    assert ids[slice(*early)] == ids[slice(*late)]
    prose_length = length - 2 * (early[1] - early[0])
    assert early[0] / prose_length == pytest.approx(depth, abs=70 / prose_length)
    text = tokenizer.decode(ids)
    assert text.count(tokenizer.decode(ids[slice(*early)])) == 2


def test_a_begin_token_stays_first():
    tokenizer = tokenizer_with_begin_token()
    document = make_calibration_document(tokenizer, corpus(), 1000, random.Random(0), depth=0)
    example = make_retrieval_example(tokenizer, corpus(), 1000, random.Random(0))
    for ids in (document.input_ids, example.prompt_ids):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert len(document.input_ids) == 1000
    assert document.early_span[0] > 0


def test_impossible_arguments_are_refused():
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    for make in (make_retrieval_example, make_calibration_document):
        with pytest.raises(RTPurboError, match="does not fit into 100 tokens"):
            make(tokenizer, corpus(), 100, rng)
        with pytest.raises(RTPurboError, match="'walks' has only"):
            make(tokenizer, corpus(10), 2000, rng)
    with pytest.raises(RTPurboError, match="between 0 and 1"):
        make_retrieval_example(tokenizer, corpus(), 1000, rng, depth=10)
    with pytest.raises(RTPurboError, match="at least one"):
        make_retrieval_example(tokenizer, corpus(), 1000, rng, num_keys=0)
