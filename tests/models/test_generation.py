"""`generate` with the small cache says what recomputation under the same mask says."""

import copy

import pytest
import torch
from transformers import DynamicCache

from rtpurbo.errors import RTPurboError
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import restore, runtime
from tests.tiny_models import (
    FAMILIES,
    HEADS,
    PADDING,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)

BATCHES = {"one sequence": (0,), "left-padded batch": PADDING}
WINDOW = {"sliding_window": 16, "block_size": 8}
NEW_TOKENS = 60


def generate(model, ids, mask, new_tokens=NEW_TOKENS, **options):
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new_tokens} | options
    return model.generate(ids, attention_mask=mask, **options)


def greedy_by_recomputation(model, ids, mask, new_tokens):
    """Greedy decoding in which every step runs the whole sequence without a cache."""
    steps = []
    for _ in range(new_tokens):
        logits = logits_of(model, ids, mask)[:, -1]
        steps.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids, torch.stack(steps, 1)


@pytest.fixture(scope="module")
def model():
    return sparse_model(**WINDOW)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", [(), (1, 4), (5,), range(HEADS)], ids=str)
def test_greedy_equals_recomputation_while_the_ring_wraps(batch, heads):
    model, (ids, mask) = sparse_model(heads=heads, **WINDOW), padded_batch(BATCHES[batch], 24)
    expected, expected_logits = greedy_by_recomputation(model, ids, mask, NEW_TOKENS)
    assert expected[:, 24:].unique().numel() > 10  # not one token for ever
    result = generate(
        model,
        ids,
        mask,
        past_key_values=HeadwiseCache(model, crop_slack=3),
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(result.sequences, expected)
    logits = torch.stack(result.logits, 1)
    assert_same_logits(logits, expected_logits, torch.ones(logits.shape[:2]))


@pytest.mark.parametrize("reading", ["paper", "residual", "far"])
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_greedy_equals_recomputation_in_every_reading(reading, granularity):
    model = sparse_model(reading=reading, granularity=granularity)
    ids, mask = padded_batch(PADDING, 30)
    expected, _ = greedy_by_recomputation(model, ids, mask, 20)
    assert torch.equal(generate(model, ids, mask, 20), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_recomputation_in_every_family(family):
    model, (ids, mask) = sparse_model(family), padded_batch(PADDING, 30)
    expected, _ = greedy_by_recomputation(model, ids, mask, 12)
    assert torch.equal(generate(model, ids, mask, 12), expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_beams_equal_recomputation(model, batch):
    ids, mask = padded_batch(BATCHES[batch], 24)
    expected = generate(model, ids, mask, 30, num_beams=2, use_cache=False)
    cached = generate(model, ids, mask, 30, num_beams=2)
    assert torch.equal(cached, expected)
    assert not torch.equal(cached, generate(model, ids, mask, 30))


def test_sampling_with_a_seed_equals_recomputation(model):
    ids, mask = padded_batch(PADDING, 24)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, mask, 30, do_sample=True, top_k=8, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], generate(model, ids, mask, 30))


def test_several_answers_to_one_prompt(model):
    ids, mask = padded_batch(PADDING, 24)
    torch.manual_seed(3)
    drawn = generate(model, ids, mask, 10, do_sample=True, num_return_sequences=2)
    assert drawn.shape == (6, 34)
    assert torch.equal(drawn[:, :24], ids.repeat_interleave(2, 0))


@pytest.mark.parametrize("chunk", [5, 16, 17])
def test_chunked_prefill_equals_recomputation(model, chunk):
    ids, mask = padded_batch(PADDING, 44)
    expected, _ = greedy_by_recomputation(model, ids, mask, 10)
    assert torch.equal(generate(model, ids, mask, 10, prefill_chunk_size=chunk), expected)


def test_a_prompt_longer_than_any_window(model):
    ids, mask = padded_batch((0, 90), 200)
    expected, _ = greedy_by_recomputation(model, ids, mask, 10)
    assert torch.equal(generate(model, ids, mask, 10), expected)


def test_a_prompt_of_one_token(model):
    ids, mask = padded_batch((0,), 1)
    expected, _ = greedy_by_recomputation(model, ids, mask, 20)
    assert torch.equal(generate(model, ids, mask, 20), expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_another_turn_continues_the_cache(model, batch):
    ids, mask = padded_batch(BATCHES[batch], 24)
    first = generate(model, ids, mask, 20, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HeadwiseCache)
    question, _ = padded_batch((0,) * len(ids), 9, seed=5)
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
    expected, _ = greedy_by_recomputation(model, ids, mask, 20)
    held = first.past_key_values.get_seq_length()
    second = generate(model, ids, mask, 20, past_key_values=first.past_key_values)
    assert held == 43  # the last token was said but not yet read
    assert torch.equal(second, expected)


def test_a_shared_prefix_is_read_once(model):
    prefix, _ = padded_batch((0,), 40)
    cache = HeadwiseCache(model)
    logits_of(model, prefix, torch.ones_like(prefix), [40], cache)
    for seed in (1, 2):
        question, _ = padded_batch((0,), 7, seed)
        ids = torch.cat([prefix, question], 1)
        mask = torch.ones_like(ids)
        answer = generate(model, ids, mask, 8, past_key_values=copy.deepcopy(cache))
        assert torch.equal(answer, greedy_by_recomputation(model, ids, mask, 8)[0])


@pytest.mark.parametrize("crop_slack", [None, 8])
def test_assisted_decoding_equals_greedy(model, crop_slack):
    ids, mask = padded_batch((0,), 24)
    expected, _ = greedy_by_recomputation(model, ids, mask, 40)
    options = {}
    if crop_slack is not None:
        options["past_key_values"] = HeadwiseCache(model, crop_slack=crop_slack)
    assistant = tiny_model(seed=7)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assert torch.equal(
        generate(model, ids, mask, 40, assistant_model=assistant, **options), expected
    )


def test_assisted_decoding_accepts_the_tokens_of_a_good_assistant(model):
    ids, mask = padded_batch((0,), 24)
    expected, _ = greedy_by_recomputation(model, ids, mask, 40)
    forwards = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    # The same weights, dense: mostly right, sometimes wrong.
    assisted = generate(model, ids, mask, 40, assistant_model=tiny_model().double())
    hook.remove()
    assert torch.equal(assisted, expected)
    assert len(forwards) < 40


@pytest.mark.parametrize("draft_tokens", [5, 70])
def test_a_sparse_draft_with_windowed_layers_proposes_its_own_tokens(draft_tokens):
    ids, mask = padded_batch((0,), 24)
    target = tiny_model("gemma3_text").double()
    expected = generate(target, ids, mask, 90)
    # The same weights and a window over everything: no proposal is rejected.
    draft = make_sparse(
        tiny_model("gemma3_text").double(), sparse_config(target, sliding_window=200)
    )
    settings = draft.generation_config
    settings.num_assistant_tokens = draft_tokens
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0
    forwards = []
    hook = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert torch.equal(generate(target, ids, mask, 90, assistant_model=draft), expected)
    hook.remove()
    assert len(forwards) <= 90 // (draft_tokens + 1) + 2
    # With a short window, some proposals are rejected.
    make_sparse(restore(draft), sparse_config(target, sliding_window=8))
    assert torch.equal(generate(target, ids, mask, 90, assistant_model=draft), expected)
    sparse = sparse_model("gemma3_text", **WINDOW)
    expected, _ = greedy_by_recomputation(sparse, ids, mask, 40)
    settings.num_assistant_tokens = 5
    assert torch.equal(generate(sparse, ids, mask, 40, assistant_model=draft), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("proposed", [4, 100])
def test_prompt_lookup_equals_greedy(family, proposed):
    """More proposed tokens than the cache can crop by default are taken into account."""
    model = sparse_model(family, **WINDOW)
    ids, mask = padded_batch((0,), 60 if proposed > 64 else 12)
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)
    expected, _ = greedy_by_recomputation(model, ids, mask, 30)
    result = generate(model, ids, mask, 30, prompt_lookup_num_tokens=proposed)
    assert torch.equal(result, expected)


def test_generate_makes_the_cache(model):
    ids, mask = padded_batch()
    output = model(ids, attention_mask=mask)
    assert isinstance(output.past_key_values, HeadwiseCache)
    assert model(ids, attention_mask=mask, use_cache=False).past_key_values is None
    result = generate(model, ids, mask, 2, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, HeadwiseCache)


def test_a_cache_that_a_checkpoint_asks_for_is_replaced(model):
    ids, mask = padded_batch(PADDING, 24)
    asked = generate(model, ids, mask, 5, cache_implementation="static")
    assert torch.equal(asked, generate(model, ids, mask, 5))


def test_training_runs_without_a_cache(model):
    ids, mask = padded_batch()
    model.train()
    try:
        output = model(ids, attention_mask=mask)
    finally:
        model.eval()
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, model(ids, attention_mask=mask).logits)


def test_a_foreign_cache_is_refused(model):
    ids, mask = padded_batch()
    with pytest.raises(RTPurboError, match="HeadwiseCache, not a DynamicCache"):
        generate(model, ids, mask, past_key_values=DynamicCache())


def test_a_restored_model_makes_its_own_cache_again():
    model, (ids, mask) = tiny_model(), padded_batch()
    expected = generate(model, ids, mask, 10)
    make_sparse(model, sparse_config(model))
    sparse = generate(model, ids, mask, 10)
    restore(model)
    result = generate(model, ids, mask, 10, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, DynamicCache)
    assert torch.equal(result.sequences, expected)
    assert not torch.equal(sparse, expected)


def test_dense_prefill_differs_only_in_how_prompts_are_read(model):
    ids, mask = padded_batch()
    with runtime(model).rule(prefill_mode="dense"):
        cache = HeadwiseCache(model)
        prompt = logits_of(model, ids, mask, [44], cache)
        assert_same_logits(prompt, logits_of(model, ids, mask), mask)
        token = prompt[:, -1:].argmax(-1)
        longer = torch.cat([mask, mask[:, -1:]], 1)
        decoded = logits_of(model, token, longer, [1], cache)
        whole = logits_of(model, torch.cat([ids, token], 1), longer)[:, -1:]
    assert not torch.allclose(prompt, logits_of(model, ids, mask), atol=1e-3)
    assert not torch.allclose(decoded, whole, atol=1e-3)


def test_a_prompt_read_in_inference_mode_is_continued():
    model = sparse_model()
    ids, _ = padded_batch((0,))
    expected = generate(model, ids, torch.ones_like(ids), max_new_tokens=6)
    with torch.inference_mode():
        cache = model(ids[:, :-4], use_cache=True).past_key_values
    options = {CACHE_NAME: cache, "max_new_tokens": 6}
    assert torch.equal(generate(model, ids, torch.ones_like(ids), **options), expected)


@pytest.mark.parametrize("prompt_under_autocast", [True, False])
def test_prompt_and_steps_may_differ_in_autocast(prompt_under_autocast):
    model = sparse_model(dtype=torch.float32)
    ids, mask = padded_batch()
    expected = logits_of(model, ids, mask)[:, -4:]

    def read(tokens, seen, cache, autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(tokens, attention_mask=mask[:, :seen], **{CACHE_NAME: cache})

    length = ids.shape[1]
    output = read(ids[:, : length - 4], length - 4, HeadwiseCache(model), prompt_under_autocast)
    steps = []
    for seen in range(length - 3, length + 1):
        output = read(
            ids[:, seen - 1 : seen], seen, output.past_key_values, not prompt_under_autocast
        )
        steps.append(output.logits.float())
    steps = torch.cat(steps, 1)
    # Rounding to bfloat16 moves a few keys across the edge of a selection.
    error = (steps - expected).abs().mean() / expected.abs().mean()
    assert error < 0.1


def test_a_mask_of_another_shape_is_refused_without_a_cache_too():
    model, (ids, mask) = sparse_model(), padded_batch()
    for wrong in (mask[:, :20], mask[:1]):
        with pytest.raises(RTPurboError, match="the attention mask is"):
            model(ids, attention_mask=wrong, use_cache=False)


def test_beams_over_the_cache_of_one_sequence_are_refused_with_advice():
    model = sparse_model()
    ids, _ = padded_batch((0,))
    cache = model(ids[:, :10], use_cache=True).past_key_values
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(RTPurboError, match="batch_repeat_interleave"):
        model.generate(ids[:, :12], **{CACHE_NAME: cache}, **options)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    answer = model.generate(ids[:, :12], **{CACHE_NAME: cache}, **options)
    assert torch.equal(answer, model.generate(ids[:, :12], **options))


def test_more_tokens_can_be_looked_up_in_the_prompt_than_the_usual_slack():
    model = sparse_model()
    ids = torch.arange(2, 60).repeat(4)[None]
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=100, **options), expected)
