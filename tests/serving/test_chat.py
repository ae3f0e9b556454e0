import signal

import pytest
import torch
from transformers import TextStreamer

import rtpurbo
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.text import chat_tokens
from rtpurbo.ops import SelectionStatistics
from rtpurbo.serving.chat import Conversation
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_tokenizer import CHAT_TEMPLATE

LONG = "the special magic numbers are hidden in the provided text " * 6


@pytest.fixture(scope="module")
def loaded(tiny_artifact):
    return rtpurbo.load(tiny_artifact)


@pytest.fixture
def conversation(loaded):
    """Random weights hardly ever end an answer, so its length is `max_new_tokens`."""
    return Conversation(*loaded, max_new_tokens=20, count_reads=True)


class Pieces(TextStreamer):
    """Streamer that collects the pieces of an answer, and calls a function after each."""

    def __init__(self, tokenizer, then=lambda pieces: None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces, self.then = [], then

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)
        self.then(self.pieces)


def say(conversation, text):
    streamer = Pieces(conversation.tokenizer)
    answer = conversation.answer(text, streamer)
    assert "".join(streamer.pieces) == answer
    return answer


def test_answers_are_those_of_generate(loaded, conversation):
    model, tokenizer = loaded
    text = say(conversation, LONG)
    ids = torch.tensor([chat_tokens(tokenizer, conversation.messages[:1])])
    output = model.generate(ids, max_new_tokens=20, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == expected
    assert conversation.messages[-1] == {"role": "assistant", "content": text}


def test_later_turns_read_only_new_tokens(loaded, conversation):
    say(conversation, LONG)
    first = conversation.last_answer
    assert first.reused_tokens == 0
    say(conversation, "and what else?")
    second = conversation.last_answer
    # All of the first prompt at least; written tokens may come back from text as others.
    assert first.prompt_tokens <= second.reused_tokens < second.prompt_tokens
    assert conversation._cache.get_seq_length() == second.prompt_tokens + second.new_tokens - 1
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("reset", [True, False])
def test_a_new_conversation_starts_without_a_cache(loaded, conversation, reset):
    expected = say(conversation, "magic")
    if reset:
        conversation.reset()
    else:
        conversation = Conversation(*loaded, max_new_tokens=20)
    assert say(conversation, "magic") == expected
    assert conversation.last_answer.reused_tokens == 0


def test_ctrl_c_stops_an_answer_between_two_tokens(conversation):
    conversation.max_new_tokens = 500

    def interrupt(pieces):
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)

    streamer = Pieces(conversation.tokenizer, interrupt)
    with pytest.raises(StoppedBySignalError), stopping_cleanly():
        conversation.answer(LONG, streamer)
    partial = conversation.messages[-1]
    assert partial == {"role": "assistant", "content": "".join(streamer.pieces)}
    answer = conversation.last_answer
    assert 0 < answer.new_tokens < 500
    assert conversation._cache.get_seq_length() == answer.prompt_tokens + answer.new_tokens - 1
    conversation.max_new_tokens = 5
    say(conversation, "go on")
    assert conversation.last_answer.reused_tokens > 0


def test_an_interruption_within_a_token_discards_the_answer_and_the_cache(conversation):
    say(conversation, "magic")
    before = list(conversation.messages)

    def interrupt(pieces):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer(LONG, Pieces(conversation.tokenizer, interrupt))
    assert conversation.messages == before
    say(conversation, "go on")
    assert conversation.last_answer.reused_tokens == 0


def test_a_failed_answer_leaves_the_conversation_unchanged(conversation, monkeypatch):
    say(conversation, "magic")
    before = list(conversation.messages)
    with monkeypatch.context() as patch:
        patch.setattr(conversation.model, "generate", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            say(conversation, "and?")
    assert conversation.messages == before
    assert conversation.last_answer is None
    say(conversation, "and?")
    assert conversation.last_answer.reused_tokens == 0  # the cache may have been half written


def test_templates_that_write_earlier_turns_anew_cost_only_reading(tiny_base, tmp_path):
    # As of models that think: earlier answers are cut down.
    cut = "(message['content'][:9] if message['role'] == 'assistant' else message['content'])"
    template = CHAT_TEMPLATE.replace("message['content']", cut)
    folder = save_tiny_artifact(tmp_path / "artifact", tiny_base)
    model, tokenizer = rtpurbo.load(folder)
    tokenizer.chat_template = template
    conversation = Conversation(model, tokenizer, max_new_tokens=100)
    say(conversation, LONG)
    say(conversation, "what is it?")
    text = conversation.messages[-1]["content"]
    # The answer was longer than what a cache can take back.
    assert conversation.last_answer.reused_tokens == 0
    again = Conversation(model, tokenizer, max_new_tokens=100)
    again.messages = conversation.messages[:2]
    assert say(again, "what is it?") == text


def test_a_few_tokens_are_taken_back(conversation):
    say(conversation, LONG)
    cached = len(conversation._cached)
    prompt = [*conversation._cached[:-3], 5, 6, 7, 8]
    prompt[cached - 3] = conversation._cached[cached - 3] + 1
    assert conversation._crop_cache(prompt) == cached - 3
    assert conversation._cache.get_seq_length() == cached - 3


def test_windows_of_layers_that_are_not_converted_are_read_again(tmp_path):
    base = save_tiny_base(tmp_path / "base", family="gemma3_text")
    model, tokenizer = rtpurbo.load(save_tiny_artifact(tmp_path / "artifact", base))
    conversation = Conversation(model, tokenizer, max_new_tokens=20)
    say(conversation, LONG)
    conversation.messages[-1]["content"] = "magic"
    text = say(conversation, "and what else?")
    assert conversation.last_answer.reused_tokens == 0
    again = Conversation(model, tokenizer, max_new_tokens=20)
    again.messages = conversation.messages[:2]
    assert say(again, "and what else?") == text


def test_the_system_message_comes_first_and_stays(loaded):
    conversation = Conversation(*loaded, system="Be brief.", max_new_tokens=3)
    say(conversation, "magic")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_templates_can_refuse_a_system_message(loaded):
    model, tokenizer = loaded
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer._tokenizer, chat_template=strict + CHAT_TEMPLATE
    )
    Conversation(model, tokenizer)
    with pytest.raises(RTPurboError, match=r"does not take these messages \(no system\)"):
        Conversation(model, tokenizer, system="Be brief.")


def test_a_model_without_a_chat_template_cannot_chat(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    model, tokenizer = rtpurbo.load(save_tiny_artifact(tmp_path / "artifact", base))
    with pytest.raises(RTPurboError, match="no chat template, so it cannot answer"):
        Conversation(model, tokenizer)


def test_a_conversation_ends_with_the_context(conversation):
    with pytest.raises(RTPurboError, match=r"context is 1,024: begin a new one"):
        say(conversation, LONG * 40)
    assert conversation.messages == []
    conversation.max_new_tokens = 5000
    text = say(conversation, LONG * 4)
    assert text
    assert conversation.last_answer.prompt_tokens + conversation.last_answer.new_tokens <= 1024


class _EveryRead(SelectionStatistics):
    """Statistics that count every key that retrieval heads read in decode steps."""

    needs_queries = True
    read = 0

    def add_queries(self, rows, selected):
        self.read += int((rows.near | selected).expand(selected.shape).sum())


def test_reads_are_those_of_every_key_counted(loaded, conversation):
    say(conversation, LONG)
    answer = conversation.last_answer
    model, tokenizer = loaded
    prompt = chat_tokens(tokenizer, conversation.messages[:1])
    counter = _EveryRead(needs_queries=True)
    with model.rtpurbo.counting(counter):
        model.generate(torch.tensor([prompt]), max_new_tokens=20, eos_token_id=None)
    steps = answer.new_tokens - 1
    assert steps == 19
    # Two retrieval heads in each of two layers.
    assert answer.tokens_read == pytest.approx(counter.read / 4 / steps)
    lengths = range(len(prompt) + 1, len(prompt) + answer.new_tokens)
    assert answer.dense_tokens_read == pytest.approx(sum(lengths) / steps)


def test_cache_sizes_are_reported(conversation):
    say(conversation, LONG)
    answer = conversation.last_answer
    tokens = answer.prompt_tokens + answer.new_tokens - 1
    assert answer.dense_cache_bytes == 2 * 3 * 2 * 8 * 4 * tokens
    assert answer.cache_bytes == conversation._cache.num_bytes()
    assert isinstance(conversation._cache, HeadwiseCache)


def test_reads_are_counted_only_on_request(loaded):
    conversation = Conversation(*loaded, max_new_tokens=3)
    say(conversation, "magic")
    assert conversation.last_answer.tokens_read is None
    assert all(module.statistics is None for module in headwise_modules(loaded[0]))
