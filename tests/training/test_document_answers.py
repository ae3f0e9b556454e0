"""Long documents, instructions, and a model's own answers."""

import random
import re

import pytest

from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.data.wordings import templates
from rtpurbo.errors import RTPurboError
from rtpurbo.training.document_answers import document_prompt, write_document_answers
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

CORPUS = TextCorpus(
    "walks",
    ("".join(f"The walker passed signpost {i} and greeted villager {i}. " for i in range(4000)),),
)


def prompt_text(seed, length=800, **options):
    tokenizer = tiny_tokenizer(**options)
    ids = document_prompt(tokenizer, CORPUS, length, random.Random(seed))
    assert len(ids) == length
    return tokenizer.decode(ids)


@pytest.mark.parametrize("options", [{}, {"chat_template": None}])
def test_a_prompt_has_its_length_and_ends_with_an_instruction(options):
    asked = set()
    for seed in range(60):
        text = prompt_text(seed, **options)
        if options:
            document, _, instruction = text.removesuffix("\n\n").rpartition("\n\n")
        else:
            body = text.removeprefix("<|im_start|>user\n")
            body = body.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
            document, _, instruction = body.rpartition("\n\n")
        shapes = [
            each
            for each in templates("train")["documents"]["instructions"]
            if re.fullmatch(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(each)), instruction)
        ]
        assert shapes
        asked.add(shapes[0])
        if "{" in re.sub(r"\{(phrase|word)\}", "{", shapes[0]) and "{" in shapes[0]:
            quoted = re.fullmatch(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(shapes[0])), instruction)
            assert quoted[1] in document
    assert len(asked) > 20


@pytest.mark.parametrize("text", ["one two three four five six ", "\u72d0\u72f8\u3002", "a"])
def test_any_text_is_accepted(text):
    corpus = TextCorpus("any", (text * 4000,))
    for seed in range(40):
        ids = document_prompt(tiny_tokenizer(), corpus, 900, random.Random(seed))
        assert len(ids) == 900


def test_a_length_without_room_is_refused():
    with pytest.raises(RTPurboError, match="does not fit into 60 tokens; ask for a length of at"):
        prompt_text(0, 60)


def test_documents_cycle_through_lengths_and_half_of_the_answers_are_greedy():
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    done = []

    def write(**options):
        return write_document_answers(
            model, tokenizer, load_texts(None), (500, 700), 5, max_answer_tokens=10, **options
        )

    found = write(progress=lambda *state: done.append(state), batch_tokens=1000)
    assert found == write(batch_tokens=1000)
    assert found != write(seed=1)
    assert len(found) == 5
    for number, sequence in enumerate(found):
        length = (500, 700)[number % 2]
        assert 0 < sequence.num_answer_tokens <= 10
        assert len(sequence.input_ids) - sequence.num_answer_tokens == length - 10
    assert [state[:3] for state in done][-1] == ("documents", 5, 5)
