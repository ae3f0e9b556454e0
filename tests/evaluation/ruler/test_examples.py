import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.ruler.tasks import TASKS
from tests.data.test_needles import tokenizer_with_begin_token
from tests.evaluation.ruler.support import examples_of
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZERS = {
    "chat": tiny_tokenizer,
    "plain": lambda: tiny_tokenizer(chat_template=None),
    "begin": tokenizer_with_begin_token,
}

# Tokens of the largest unit of a haystack; units shorter than 1 % of the length are left out.
UNITS = {
    "niah_multikey_2": 45,
    "niah_multikey_3": 110,
    "cwe": 60,
    "fwe": 45,
    "qa_1": 70,
    "qa_2": 70,
}


@pytest.mark.parametrize("length", [2300, 6144, 9001])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_context(task, tokenizer, length):
    for example in examples_of(task, length, samples=2, tokenizer=TOKENIZERS[tokenizer]()):
        used = len(example.prompt_ids) + TASKS[task].tokens_to_generate
        assert length - max(UNITS.get(task, 0), length // 100) <= used <= length


def test_there_are_thirteen_tasks_with_rulers_room_for_answers():
    room = {name: task.tokens_to_generate for name, task in TASKS.items()}
    assert len(room) == 13
    assert {room[name] for name in room if name.startswith("niah")} == {128}
    assert [room[name] for name in ("vt", "cwe", "fwe", "qa_1", "qa_2")] == [30, 120, 50, 32, 32]


@pytest.mark.parametrize("task", TASKS)
def test_number_k_is_the_same_whatever_else_is_asked(task):
    [first, second] = examples_of(task, samples=2)
    assert examples_of(task, samples=1) == [first]
    assert first.prompt_ids != second.prompt_ids
    assert examples_of(task, samples=1, seed=1) != [first]


@pytest.mark.parametrize("task", TASKS)
def test_the_minimum_length_is_named_and_sufficient(task):
    with pytest.raises(RTPurboError, match=rf"{task} does not fit into 300 tokens") as error:
        examples_of(task, 300)
    least = int(str(error.value).split("at least ")[1].rstrip(".").replace(",", ""))
    examples = examples_of(task, least)
    assert all(len(example.answers) > 0 for example in examples)
    with pytest.raises(RTPurboError, match=f"at least {least:,}"):
        examples_of(task, least - 1)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_occurs_only_in_the_text(task):
    tokenizer = tiny_tokenizer(chat_template=None)
    for example in examples_of(task, tokenizer=tokenizer):
        text = tokenizer.decode(example.prompt_ids)
        before, _, opening = text.rpartition("\n\n")
        assert all(answer in before for answer in example.answers)
        assert not any(answer in opening for answer in example.answers)
        assert opening == opening.strip() != ""
