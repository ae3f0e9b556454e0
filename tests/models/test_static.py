"""A static cache says what a growing one says, and nothing of it moves."""

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.models.cache import HeadwiseCache, roomy_capacity
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.sparsify import runtime
from tests.models.test_slots import Looks, holes, states_seen  # noqa: F401
from tests.models.zoo.configurations import EQUAL, HEADS_BY_LAYER
from tests.tiny_models import (
    FAMILIES,
    PADDING,
    any_model,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
)

BATCHES = {"one sequence": (0,), "whole sequences": (0, 0), "left-padded batch": PADDING}
PROMPT, LENGTH = 24, 90


@pytest.fixture(scope="module")
def model():
    return sparse_model()


def model_of(name):
    """A sparse model of a family, or of a type of the zoo whose layers differ."""
    if name in FAMILIES:
        return sparse_model(name)
    model_type, changes = EQUAL[name]
    model = any_model(model_type, **changes).double()
    return make_sparse(model, sparse_config(model, prefill_mode="top_p", top_p=0.6))


def static_cache(model, ids, mask, capacity=128, crop_slack=8):
    """A cache that was made static after the prompt."""
    cache = HeadwiseCache(model, crop_slack=crop_slack)
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    cache.make_static(capacity)
    return cache


def addresses(cache):
    """Where everything lies that a step of one token reads or writes."""
    tensors = list(cache.slots.tensors())
    for layer in cache.layers:
        if isinstance(layer, HeadwiseLayer):
            tensors += [tensor for _, _, tensor in layer.held_tensors()]
        else:
            tensors += [layer.keys, layer.values]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("family", [*FAMILIES, *HEADS_BY_LAYER])
@pytest.mark.parametrize("batch", BATCHES)
def test_steps_equal_one_forward_while_every_ring_wraps(family, batch):
    model, (ids, mask) = model_of(family), padded_batch(BATCHES[batch], LENGTH)
    cache = static_cache(model, ids, mask)
    before = addresses(cache)
    steps = [1] * (LENGTH - PROMPT)
    decoded = logits_of(model, ids[:, PROMPT:], mask, steps, cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)
    assert addresses(cache) == before
    assert cache.is_static
    assert cache.get_seq_length() == LENGTH
    assert cache.slots.length.item() == LENGTH


def test_steps_with_an_index_in_float8(model):
    ids, mask = padded_batch(PADDING, LENGTH)
    with runtime(model).rule(index_storage="float8"):
        cache = static_cache(model, ids, mask)
        decoded = logits_of(model, ids[:, PROMPT:], mask, [1] * (LENGTH - PROMPT), cache)
        assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)


@pytest.mark.parametrize("heads", [(), (1, 4), range(6)], ids=str)
def test_layers_of_one_kind_of_heads(heads):
    model, (ids, mask) = sparse_model(heads=heads), padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    decoded = logits_of(model, ids[:, PROMPT:], mask, [1] * (LENGTH - PROMPT), cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("chunks", [[1, 1, 9, 1, 1, 20, 1, 1, 31], [3] * 22], ids=str)
def test_several_tokens_can_be_added(family, batch, chunks):
    model, (ids, mask) = sparse_model(family), padded_batch(BATCHES[batch], LENGTH)
    cache = static_cache(model, ids, mask)
    before = addresses(cache)
    decoded = logits_of(model, ids[:, PROMPT:], mask, chunks, cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)
    assert addresses(cache) == before
    assert cache.slots.length.item() == LENGTH


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("chunks", [[1] * 66, [1, 30, 1, 34]], ids=str)
def test_a_larger_capacity_is_taken_where_it_is_needed(family, chunks):
    model, (ids, mask) = sparse_model(family), padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask, capacity=PROMPT + 5)
    decoded = logits_of(model, ids[:, PROMPT:], mask, chunks, cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)
    assert cache.slots.capacity == 512


@pytest.mark.parametrize(
    ("tokens", "expected", "capacity"),
    [(100, 0, 512), (100, 150, 256), (100, 10**6, 2304), (80_000, 0, 90_112), (0, 0, 256)],
)
def test_the_room_that_is_left(tokens, expected, capacity):
    assert roomy_capacity(tokens, expected) == capacity


def test_states_span_the_capacity(model, states_seen):  # noqa: F811
    ids, mask = padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    states_seen.clear()
    logits_of(model, ids[:, PROMPT:30], mask[:, :30], [1] * 6, cache)
    query_positions, full, bounded = states_seen[-1]
    assert query_positions[:, 0].tolist() == [29 - pad for pad in PADDING]
    assert full.keys.shape[2] == full.index_keys.shape[2] == 128
    expected = [[p - pad if pad <= p < 30 else -1 for p in range(128)] for pad in PADDING]
    assert full.positions.tolist() == expected
    assert full.first_slots.tolist() == list(PADDING)
    assert full.length.tolist() == [30]
    assert full.length.dtype == full.first_slots.dtype == torch.int32
    assert not full.in_order
    assert bounded.length is None


def test_whole_sequences_begin_at_slot_zero(model, states_seen):  # noqa: F811
    ids, mask = padded_batch((0, 0), LENGTH)
    cache = static_cache(model, ids, mask)
    logits_of(model, ids[:, PROMPT:30], mask[:, :30], [1] * 5 + [1], cache)
    assert not states_seen[-1][1].in_order
    assert states_seen[-1][1].first_slots.tolist() == [0, 0]


@pytest.mark.parametrize("padding", [(0, 0), PADDING], ids=str)
def test_a_step_needs_no_look(padding):
    model, (ids, mask) = sparse_model(sliding_window=64), padded_batch(padding, LENGTH)
    cache = static_cache(model, ids, mask, capacity=LENGTH)
    with Looks() as looks:
        logits_of(model, ids[:, PROMPT:], mask, [1] * (LENGTH - PROMPT), cache)
    assert looks.count == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_reordering_commutes_with_recomputation_and_moves_nothing(family):
    model, (ids, mask) = sparse_model(family), padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    before, start = addresses(cache), PROMPT
    for order in ([2, 0, 1], [1, 1, 0], [0, 2, 2]):
        logits_of(model, ids[:, start : start + 15], mask[:, : start + 15], [1] * 15, cache)
        start += 15
        order = torch.tensor(order)
        cache.reorder_cache(order)
        ids, mask = ids[order], mask[order]
    assert addresses(cache) == before
    decoded = logits_of(model, ids[:, start:], mask, [1] * (LENGTH - start), cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, start:], mask)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_can_be_repeated_and_selected(family):
    model, (ids, mask) = sparse_model(family), padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    logits_of(model, ids[:, PROMPT:50], mask[:, :50], [1] * 26, cache)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 3, 4, 5])
    cache.batch_select_indices(rows)
    ids, mask = (part.repeat_interleave(2, 0)[rows] for part in (ids, mask))
    decoded = logits_of(model, ids[:, 50:], mask, [1] * 40, cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, 50:], mask)


def test_cropping_commutes_with_recomputation(model):
    ids, mask = padded_batch(PADDING, LENGTH)
    other, _ = padded_batch(PADDING, LENGTH, seed=9)
    cache = static_cache(model, ids, mask)
    before = addresses(cache)
    logits_of(model, ids[:, PROMPT:50], mask[:, :50], [1] * 26, cache)
    cache.crop(-5)
    ids = torch.cat([ids[:, :45], other[:, 45:]], 1)
    decoded = logits_of(model, ids[:, 45:], mask, [1] * 45, cache)
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, 45:], mask)
    assert addresses(cache) == before
    assert cache.slots.length.item() == LENGTH


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cropped_steps_leave_no_trace(family):
    """As a graph is warmed up: a step runs, is not counted, and runs again."""
    model = sparse_model(family)
    ids, mask = padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask, crop_slack=0)
    steps = []
    for end in range(PROMPT + 1, LENGTH + 1):
        for _ in range(2):
            logits_of(model, ids[:, end - 1 : end], mask[:, :end], [1], cache)
            cache.rewind(end - 1)
        steps.append(logits_of(model, ids[:, end - 1 : end], mask[:, :end], [1], cache))
    expected = logits_of(model, ids, mask)[:, PROMPT:]
    assert_same_logits(torch.cat(steps, 1), expected, mask)


def test_padding_between_tokens_cannot_be_static(model):
    ids, mask = padded_batch()
    cache = HeadwiseCache(model)
    logits_of(model, ids, holes(mask), [44], cache)
    assert not cache.can_be_static
    with pytest.raises(RTPurboError, match="between tokens"):
        cache.make_static(128)


def test_padding_between_tokens_ends_it(model):
    ids, mask = padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    mask[:, 40:43] = 0
    decoded = logits_of(model, ids[:, PROMPT:], mask, [1, 1, 30, 1, 33], cache)
    assert not cache.is_static
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)


@pytest.mark.parametrize("emptied", ["reset", "crop"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_emptied_cache_starts_anew(family, emptied):
    model, (ids, mask) = sparse_model(family), padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    if emptied == "crop" and family == "gemma3_text":
        pytest.skip("a window that is full cannot be cropped")
    cache.crop(-PROMPT) if emptied == "crop" else cache.reset()
    assert not cache.is_static
    decoded = logits_of(model, ids[:2], mask[:2], [20, 1, 69], cache)
    assert_same_logits(decoded, logits_of(model, ids[:2], mask[:2]), mask[:2])


def test_room_and_tokens_are_needed(model):
    with pytest.raises(RTPurboError, match="read the prompt first"):
        HeadwiseCache(model).make_static(128)
    ids, mask = padded_batch()
    with pytest.raises(RTPurboError, match="leave it room"):
        static_cache(model, ids, mask, capacity=10)


def test_windowed_layers_that_record_their_past_end_it():
    model, (ids, mask) = sparse_model("gemma3_text"), padded_batch(PADDING, LENGTH)
    cache = static_cache(model, ids, mask)
    logits_of(model, ids[:, PROMPT:40], mask[:, :40], [1] * 16, cache)
    cache.activate_past_recording()
    assert not cache.is_static
    decoded = []
    for end in range(41, 61):
        decoded.append(logits_of(model, ids[:, end - 1 : end], mask[:, :end], [1], cache))
        cache.crop(0)  # which every step then waits for
    expected = logits_of(model, ids[:, :60], mask[:, :60])[:, 40:]
    assert_same_logits(torch.cat(decoded, 1), expected, mask[:, :60])
