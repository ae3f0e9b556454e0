"""Conversations that a model writes with itself."""

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.training.conversations import is_usable, write_conversations
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

END = "<|im_end|>"


def writer(**changes):
    return tiny_model(
        "llama", vocab_size=len(tiny_tokenizer()), max_position_embeddings=2048, **changes
    )


def indifferent():
    """A model to which all tokens are equally likely, so that turns end now and then."""
    model = writer()
    model.lm_head.weight.zero_()
    return model


def write(model, count=8, tokenizer=None, **options):
    options = {"max_user_tokens": 40, "max_answer_tokens": 30, "batch_size": 4, **options}
    return write_conversations(model, tokenizer or tiny_tokenizer(), count, **options)


def parts(sequence):
    """The tokens of the prompt and of the answer."""
    cut = len(sequence.input_ids) - sequence.num_answer_tokens
    return sequence.input_ids[:cut], sequence.input_ids[cut:]


def user_text(prompt):
    """Returns the user's message, after checking that the template renders it."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(prompt)
    said = text.removeprefix("<|im_start|>user\n").removesuffix(f"{END}\n<|im_start|>assistant\n")
    messages = [{"role": "user", "content": said}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == rendered
    return said


def test_the_same_seed_writes_the_same():
    model = indifferent()
    assert write(model) == write(model)
    assert write(model) != write(model, seed=1)


def test_user_turns_are_distinct_and_inside_their_template():
    found = write(indifferent(), 12)
    assert len(found) == 12
    said = [user_text(parts(sequence)[0]) for sequence in found]
    assert len(set(said)) == 12
    assert all(is_usable(text) for text in said)


def test_answers_end_with_their_turn_unless_they_are_too_long():
    end = tiny_tokenizer().convert_tokens_to_ids(END)
    answers = [
        parts(each)[1] for each in write(indifferent(), 24, max_answer_tokens=200, batch_size=24)
    ]
    ended = [answer for answer in answers if answer[-1] == end]
    assert len(ended) > 4
    assert all(len(answer) == 200 for answer in answers if answer[-1] != end)
    assert not any(end in answer[:-1] for answer in answers)


def test_half_of_the_answers_are_greedy():
    model = writer()
    greedy = 0
    for sequence in write(model, 8):
        prompt, answer = parts(sequence)
        with torch.no_grad():
            logits = model(torch.tensor([sequence.input_ids])).logits[0, len(prompt) - 1 : -1]
        greedy += logits.argmax(-1).tolist() == answer
    assert greedy == 4


def test_without_a_chat_template_text_is_sampled():
    tokenizer = tiny_tokenizer(chat_template=None)
    found = write(writer(), 6, tokenizer)
    assert len(found) == 6
    assert all(0 < each.num_answer_tokens < len(each.input_ids) for each in found)
    assert not any("<|im_start|>user" in tokenizer.decode(parts(each)[0]) for each in found)


def test_a_model_that_writes_empty_user_turns_is_refused():
    model = writer()
    end = tiny_tokenizer().convert_tokens_to_ids(END)
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([end]), 1e4)
    )
    with pytest.raises(RTPurboError, match="no usable user turn"):
        write(model, 4)


@pytest.mark.parametrize(
    ("text", "opening", "expected"),
    [
        ("What is a prime number?", "", True),
        ("Solve 2x = 4.", "Solve", True),
        ("Solve", "Solve", False),
        ("", "", False),
        ("?!...", "", False),
        ("no no no no no no no no", "", False),
        ("ok", "", True),
    ],
)
def test_usable_turns(text, opening, expected):
    assert is_usable(text, opening) == expected
