"""Padding is looked at once, and told to the operators; decoding needs no look."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo.errors import RTPurboError
from rtpurbo.models import sparse_layer
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.ring import RingSlots
from rtpurbo.models.slots import TokenSlots, padding_form, positions_of
from tests.oracles import left_padded_positions
from tests.tiny_models import (
    LENGTH,
    PADDING,
    assert_same_logits,
    logits_of,
    padded_batch,
    sparse_model,
)

CPU = torch.device("cpu")


class Looks(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return sparse_model()


@pytest.fixture
def states_seen(monkeypatch):
    """The states of full and windowed KV heads that the first layer hands to the operators."""
    seen = []
    original = sparse_layer.attend_with

    def recorded(backend, call):
        seen.append((call.query_positions, call.full, call.windowed))
        return original(backend, call)

    monkeypatch.setattr(sparse_layer, "attend_with", recorded)
    return seen


def holes(mask):
    """The same mask with holes behind real tokens."""
    mask = mask.clone()
    mask[:, 20:23] = 0
    return mask


@pytest.mark.parametrize(
    ("rows", "form", "begun"),
    [
        (["1111", "1111"], "none", True),
        (["0111", "1111"], "left", True),
        (["0000", "0001"], "left", False),
        (["1110", "1111"], "any", True),
        (["1011", "1111"], "any", True),
        (["1", "1"], "none", True),
        (["0", "1"], "left", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_form_of_a_mask(rows, form, begun, dtype):
    mask = torch.tensor([[int(digit) for digit in row] for row in rows]).to(dtype)
    with Looks() as looks:
        assert padding_form(mask) == (form, begun)
    assert looks.count <= 3  # the answers come in one copy


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])
    assert positions_of(mask).tolist() == [[-1, 0, -1, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("chunks", [[LENGTH], [3, 1, 1, 1, 1, 37], [1] * LENGTH], ids=str)
def test_labels_under_left_padding_are_those_of_the_mask(chunks):
    _, mask = padded_batch()
    slots, seen = TokenSlots(RingSlots(2, 8, 0)), 0
    for new in chunks:
        slots.begin_forward(mask[:, : seen + new], 3, seen, new, CPU)
        seen += new
        expected = left_padded_positions(PADDING, LENGTH)[:, :seen]
        assert torch.equal(slots.positions, expected)
        assert torch.equal(slots.query_positions, expected[:, -new:])
        assert slots.first_slots.tolist() == [min(pad, seen) for pad in PADDING]
        assert slots.next_positions(seen).tolist() == [max(0, seen - pad) for pad in PADDING]
    assert slots.padding == "left"


def test_padding_at_any_place_is_kept():
    _, mask = padded_batch()
    slots = TokenSlots(RingSlots(2, 8, 0))
    slots.begin_forward(holes(mask), 3, 0, LENGTH, CPU)
    assert (slots.padding, slots.first_slots) == ("any", None)
    assert torch.equal(slots.positions, positions_of(holes(mask)))
    longer = torch.cat([mask, mask[:, -2:]], 1)
    slots.begin_forward(longer, 3, LENGTH, 2, CPU)
    assert slots.padding == "any"
    slots.begin_forward(mask, 3, 0, LENGTH, CPU)
    assert slots.padding == "left"


def test_a_mask_of_the_new_tokens_alone_is_refused(model):
    ids, mask = padded_batch()
    cache = HeadwiseCache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(RTPurboError, match="covers the tokens in the cache"):
        model(ids[:, :2], attention_mask=mask[:, :2], past_key_values=cache)


@pytest.mark.parametrize("padding", [(0, 0), (5, 0, 11)], ids=str)
def test_decoding_needs_no_look(padding):
    # So wide a window that the eager operators do not look for the keys in its reach.
    model, (ids, mask) = sparse_model(sliding_window=32), padded_batch(padding)
    cache = HeadwiseCache(model, crop_slack=8)
    logits_of(model, ids[:, :40], mask[:, :40], [40], cache)
    with Looks() as looks:
        logits_of(model, ids[:, 40:], mask, [1] * 4, cache)
    assert looks.count == 0
    assert cache.padding == ("left" if any(padding) else "none")


def test_states_without_padding_are_in_order(model, states_seen):
    ids, mask = padded_batch((0, 0))
    logits_of(model, ids, mask, [20, 1, 23])
    first, decoded, chunk = states_seen[::2]
    assert first[1].in_order
    assert first[2].in_order
    assert decoded[1].in_order
    assert not decoded[2].in_order  # a ring
    assert chunk[1].in_order
    assert chunk[2].sink_slots.tolist() == [0, 0]
    for _, full, bounded in states_seen:
        assert full.first_slots is None
        assert full.length is None
        assert not (bounded.in_order and bounded.first_slots is not None)


def test_positions_after_left_padding_give_the_beginning_of_sequences(model, states_seen):
    ids, mask = padded_batch()
    logits_of(model, ids, mask, [20, 1, 23])
    for _, full, _ in states_seen:
        assert not full.in_order
        assert full.first_slots.tolist() == list(PADDING)
    first, decoded, chunk = states_seen[::2]
    assert first[2].first_slots.tolist() == list(PADDING)
    assert decoded[2].first_slots is None
    # Two sinks, and the seven tokens before the chunk that its first query sees.
    assert chunk[2].first_slots.tolist() == [2 + 7 - 21 + pad for pad in PADDING]


def test_positions_with_gaps_give_no_beginning(model, states_seen):
    ids, mask = padded_batch()
    logits_of(model, ids, holes(mask), [30, 1, 13])
    for _, *both in states_seen:
        for states in both:
            assert not states.in_order
            assert states.first_slots is None
            assert states.sink_slots is None


def test_without_a_cache_only_whole_sequences_are_in_order(model, states_seen):
    for padding in ((0, 0), PADDING):
        ids, mask = padded_batch(padding)
        logits_of(model, ids, mask)
        for states in states_seen[-1][1:]:
            assert states.in_order == (padding == (0, 0))
            assert states.first_slots is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("form", ["left", "any"])
@pytest.mark.parametrize("chunks", [[30, 1, 1, 12], [1] * 44, [3, 5, 17, 1, 1, 9, 8]], ids=str)
def test_chunks_equal_one_forward(family, form, chunks):
    model, (ids, mask) = sparse_model(family), padded_batch()
    mask = holes(mask) if form == "any" else mask
    cache = HeadwiseCache(model)
    if form == "any" and chunks == [1] * 44:
        pytest.skip("a token that comes alone is real")
    chunked = logits_of(model, ids, mask, chunks, cache)
    assert_same_logits(chunked, logits_of(model, ids, mask), mask)
    assert cache.padding == form


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_decoding_step_may_leave_the_mask_out(family):
    model, (ids, mask) = sparse_model(family), padded_batch()
    cache = HeadwiseCache(model)
    logits_of(model, ids[:, :43], mask[:, :43], [43], cache)
    places = mask.cumsum(1)[:, -1:] - 1
    with torch.no_grad():
        decoded = model(ids[:, 43:], position_ids=places, past_key_values=cache).logits
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, -1:], mask)


def test_arguments_without_names_are_understood(model):
    ids, mask = padded_batch()
    with torch.no_grad():
        named = model.base_model(input_ids=ids, attention_mask=mask)
        unnamed = model.base_model(ids, mask)
    assert torch.equal(named.last_hidden_state, unnamed.last_hidden_state)
    assert unnamed.past_key_values.padding == "left"
