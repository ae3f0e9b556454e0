"""The user's turn of chat templates of several families."""

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.training.chat_template import UserTurn
from tests.tiny_tokenizer import tiny_tokenizer

TRIMMING = (
    "{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
BRACKETS = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"


def test_the_turn_of_the_tiny_tokenizer():
    tokenizer = tiny_tokenizer()
    turn = UserTurn.of(tokenizer)
    assert turn.before == "<|im_start|>user\n"
    assert turn.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert turn.stop_tokens(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize(
    ("template", "before", "after", "sampled"),
    [
        (TRIMMING, "<start>user\n", "<end>\n<start>model\n", "Add two and two.<end>\n<start>mo"),
        (BRACKETS, "[INST] ", " [/INST]", "Add two and two. [/INST] Four."),
    ],
)
def test_end_of_turn_text_that_is_no_special_token_is_found(template, before, after, sampled):
    tokenizer = tiny_tokenizer(chat_template=template)
    turn = UserTurn.of(tokenizer)
    assert (turn.before, turn.after) == (before, after)
    assert turn.stop_tokens(tokenizer) == []
    assert turn.user_text(sampled) == "Add two and two."
    assert turn.user_text(" Add two") == "Add two"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}user:{% endfor %}", "changes a user message"),
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    ],
)
def test_other_templates_are_refused(template, message):
    with pytest.raises(RTPurboError, match=message):
        UserTurn.of(tiny_tokenizer(chat_template=template))
