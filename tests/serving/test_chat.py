import signal

import pytest
import torch

import rtpurbo
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import counting
from rtpurbo.models.text import chat_tokens
from rtpurbo.ops import SelectionStatistics
from rtpurbo.serving.chat import Conversation, Sampling, reads_of_steps
from tests.models.zoo.configurations import EQUAL
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import any_model, make_sparse, sparse_config, sparse_model
from tests.tiny_tokenizer import CHAT_TEMPLATE

LONG = "the special magic numbers are hidden in the provided text " * 6


@pytest.fixture(scope="module")
def loaded(tiny_artifact):
    return rtpurbo.load(tiny_artifact)


@pytest.fixture
def conversation(loaded):
    """Random weights hardly ever end an answer, so its length is `max_new_tokens`."""
    return Conversation(*loaded, max_new_tokens=20, count_reads=True)


def say(conversation, text):
    pieces = []
    answer = conversation.answer(text, pieces.append)
    assert "".join(pieces) == answer
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
    pieces = []

    def interrupt(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StoppedBySignalError), stopping_cleanly():
        conversation.answer(LONG, interrupt)
    partial = conversation.messages[-1]
    assert partial["role"] == "assistant"
    assert partial["content"].startswith("".join(pieces))
    answer = conversation.last_answer
    assert 0 < answer.new_tokens < 500
    assert conversation._cache.get_seq_length() == answer.prompt_tokens + answer.new_tokens - 1
    conversation.max_new_tokens = 5
    say(conversation, "go on")
    assert conversation.last_answer.reused_tokens > 0


def test_any_other_interruption_keeps_the_text_and_not_the_cache(conversation):
    conversation.max_new_tokens = 500

    def interrupt(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer(LONG, interrupt)
    assert 0 < conversation.last_answer.new_tokens < 500
    assert len(conversation.messages) == 2
    conversation.max_new_tokens = 5
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
    held = len(conversation._held)
    prompt = [*conversation._held[:-3], 5, 6, 7, 8]
    prompt[held - 3] = conversation._held[held - 3] + 1
    assert conversation._reuse(prompt) == held - 3
    assert conversation._cache.get_seq_length() == held - 3


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


def test_sampling_follows_its_settings(loaded):
    def answer(sampling, seed=0):
        torch.manual_seed(seed)
        return say(Conversation(*loaded, max_new_tokens=12, sampling=sampling), "magic")

    greedy = answer(Sampling(temperature=0))
    assert answer(None) == greedy  # the tiny model's settings name no sampling
    assert answer(Sampling(temperature=3.0, top_k=1)) == greedy
    assert answer(Sampling(temperature=3.0)) == answer(Sampling(temperature=3.0)) != greedy
    assert answer(Sampling(top_p=0.99), 1) != answer(Sampling(top_p=0.99), 2)


class _EveryRead(SelectionStatistics):
    """Counts, key by key, what a decoding row's retrieval heads read."""

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
    with counting(model, counter):
        model.generate(torch.tensor([prompt]), max_new_tokens=20, eos_token_id=None)
    # Two retrieval heads of six in each of two layers; the others see 2 sinks and 32 keys.
    steps = answer.new_tokens - 1
    assert steps == 19
    total = counter.read + 2 * 4 * (2 + 32) * steps
    assert answer.tokens_read == pytest.approx(total / 12 / steps)
    lengths = range(len(prompt) + 1, len(prompt) + answer.new_tokens)
    assert answer.dense_tokens_read == pytest.approx(sum(lengths) / steps)


def test_layers_with_windows_of_their_own_read_those():
    model = sparse_model("gemma3_text", sliding_window=8)
    near, dense = reads_of_steps(model, [5, 100])
    # Two layers of 8 keys, one of all keys; six heads each. Retrieval heads have windows as well.
    assert near == 6 * (2 * (5 + 8) + 5 + (8 + 2))
    assert dense == 6 * (2 * (5 + 8) + 105)


@pytest.mark.parametrize(
    ("name", "own"), [("Qwen3.5", 0), ("Llama 4", 3 * 6 * (5 + 4)), ("Laguna", 2 * 6 * (5 + 8))]
)
def test_layers_without_attention_read_nothing_and_chunks_read_their_own(name, own):
    model_type, changes = EQUAL[name]
    model = any_model(model_type, **changes)
    make_sparse(model, sparse_config(model, (0,)))
    near, dense = reads_of_steps(model, [5, 100])
    full = len(headwise_modules(model))
    assert near == own + full * 6 * (5 + 2 + 8)
    assert dense == own + full * 6 * (5 + 100)


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
