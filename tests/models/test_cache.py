"""The cache: what it holds, what it costs, and that rearranging it commutes with recomputation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.errors import RTPurboError
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.cache_layers import GrowingBuffer, HeadwiseLayer, RingBuffer
from rtpurbo.models.ring import RingSlots
from rtpurbo.models.slots import TokenSlots
from rtpurbo.models.sparsify import runtime
from tests.oracles import is_near, left_padded_positions
from tests.tiny_models import (
    LENGTH,
    PADDING,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)

FAR = 40  # tokens after which every ring below has wrapped


@pytest.fixture(scope="module")
def model():
    return sparse_model()


def tensors_in(thing):
    """Every tensor reachable from an object's attributes, but for what layers have in common."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, (TokenSlots, RingSlots)):
        return []
    parts = thing if isinstance(thing, list) else vars(thing).values()
    return [
        tensor
        for part in parts
        if isinstance(part, (torch.Tensor, list)) or type(part).__module__.startswith("rtpurbo")
        for tensor in tensors_in(part)
    ]


def filled(model, ids, mask, crop_slack=8, chunks=None):
    cache = HeadwiseCache(model, crop_slack=crop_slack)
    logits_of(model, ids, mask, chunks or [ids.shape[1]], cache)
    return cache


def check_continuation(model, cache, ids, mask, held):
    """Reading on from the cache says what reading `ids` from the start says."""
    chunks = [ids.shape[1] - held - 2, 1, 1]
    continued = logits_of(model, ids[:, held:], mask, chunks, cache)
    assert_same_logits(continued, logits_of(model, ids, mask)[:, held:], mask)


@given(
    padding=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    window=st.integers(1, 9),
    sinks=st.integers(0, 3),
    slack=st.integers(0, 4),
    ordered=st.booleans(),
)
@settings(max_examples=100)
def test_the_ring_shows_each_query_its_sinks_and_window(
    padding, chunks, window, sinks, slack, ordered
):
    slots, start = RingSlots(sinks, window, slack), 0
    ring = RingBuffer(slots)
    positions = left_padded_positions(padding, sum(chunks))
    for new in chunks:
        chunk = positions[:, start : start + new]
        labels = chunk[:, None, :, None].double()
        first_slots = None
        if ordered:
            first_slots = torch.tensor(padding, dtype=torch.int32).clamp(max=start + new)
        slots.begin_forward(chunk, first_slots, start)
        states = ring.append(labels, labels + 1000)
        check_addresses(states, sinks, is_chunk_behind_ring=ordered and start > 0 and new > 1)
        for row, (queries, held) in enumerate(
            zip(chunk.tolist(), states.positions.tolist(), strict=True)
        ):
            real = [position for position in held if position >= 0]
            assert len(real) == len(set(real))
            for query in queries:
                wanted = {key for key in range(query + 1) if is_near(query, key, window, sinks)}
                assert wanted <= set(real)
            for slot, position in enumerate(held):
                if position >= 0:
                    assert states.keys[row, 0, slot, 0] == position
                    assert states.values[row, 0, slot, 0] == position + 1000
        start += new
        assert ring.keys.shape[2] == sinks + window + slack + 1


def check_addresses(states, sinks, is_chunk_behind_ring):
    """Every label lies where `first_slots` and `sink_slots` say."""
    assert (states.sink_slots is not None) == is_chunk_behind_ring
    if states.first_slots is None:
        return
    assert states.first_slots.dtype == torch.int32
    for row, held in enumerate(states.positions.tolist()):
        for slot, position in enumerate(held):
            if position >= 0 and is_chunk_behind_ring and position < sinks:
                assert slot == position + states.sink_slots[row]
            elif position >= 0:
                assert slot == position + states.first_slots[row]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), reserve=st.integers(0, 60))
@settings(max_examples=40)
def test_a_growing_buffer_has_little_slack(sizes, reserve):
    buffer = GrowingBuffer(reserve)
    states = torch.arange(sum(sizes), dtype=torch.float32).reshape(1, 1, -1, 1)
    for end in torch.tensor(sizes).cumsum(0).tolist():
        held = buffer.append(states[:, :, buffer.length : end])
        assert torch.equal(held, states[:, :, :end])
        assert buffer.storage.shape[2] <= max(reserve, end + end // 8)


def test_a_reserved_buffer_is_allocated_once():
    buffer = GrowingBuffer(reserve=100)
    buffer.append(torch.ones(1, 1, 1, 4))
    address = buffer.storage.data_ptr()
    buffer.append(torch.ones(1, 1, 99, 4))
    assert buffer.storage.data_ptr() == address


def test_bounded_heads_stop_growing_and_bytes_are_measured(model):
    ids, mask = padded_batch((0,), 200)
    cache, ring_bytes, total = HeadwiseCache(model, crop_slack=2, reserve=0), set(), []
    start = 0
    for size in [30, 1, 1, 40, 1, 60, 67]:
        end = start + size
        logits_of(model, ids[:, start:end], mask[:, :end], [size], cache)
        layer = cache.layers[0]
        ring_bytes.add(layer.ring.keys.nbytes + layer.ring.values.nbytes)
        total.append(cache.num_bytes())
        held = [*tensors_in(cache.layers), cache.slots.first_slots, cache.slots.ring.positions]
        assert cache.num_bytes() == sum(tensor.nbytes for tensor in held)
        start = end
    assert len(ring_bytes) == 1
    assert total == sorted(total)
    assert total[-1] > total[0]


@pytest.mark.parametrize(("heads", "grows"), [((), False), ((1,), True)])
def test_only_retrieval_heads_cost_memory_that_grows(heads, grows):
    model, (ids, mask) = sparse_model(heads=heads), padded_batch((0,), 200)
    sizes = [filled(model, ids[:, :n], mask[:, :n]).num_bytes() for n in (100, 200)]
    assert (sizes[1] > sizes[0]) == grows


def test_the_cache_is_smaller_than_a_dense_one(model):
    ids, mask = padded_batch((0,), 200)
    cache = filled(sparse_model(heads=(0,)), ids, mask)
    dense = tiny_model().double()(ids, attention_mask=mask).past_key_values
    dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    assert cache.num_bytes() < 0.75 * dense_bytes


def test_an_index_in_float8_takes_one_byte_per_number(model):
    ids, mask = padded_batch()
    with runtime(model).rule(index_storage="float8"):
        cache = filled(model, ids[:, :FAR], mask[:, :FAR])
        for layer in cache.layers:
            assert layer.index_keys.storage.dtype == torch.float8_e4m3fn
        check_continuation(model, cache, ids, mask, FAR)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 0]])
def test_reordering_commutes_with_recomputation(model, order):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    cache.reorder_cache(torch.tensor(order))
    check_continuation(model, cache, ids[order], mask[order], FAR)


def test_repeating_commutes_with_recomputation(model):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    cache.batch_repeat_interleave(2)
    ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    check_continuation(model, cache, ids, mask, FAR)


@pytest.mark.parametrize("rows", [[1], [2, 0]])
def test_selecting_rows_commutes_with_recomputation(model, rows):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    cache.batch_select_indices(torch.tensor(rows))
    check_continuation(model, cache, ids[rows], mask[rows], FAR)


@pytest.mark.parametrize("slack", [0, 1, 4])
def test_the_slack_is_the_number_of_tokens_that_can_be_cropped(model, slack):
    ids, mask = padded_batch()
    cache = filled(model, ids, mask, crop_slack=slack)
    with pytest.raises(RTPurboError, match=f"at most {slack} tokens"):
        cache.crop(-(slack + 1))
    cache.crop(-slack)
    assert cache.get_seq_length() == LENGTH - slack


@pytest.mark.parametrize("removed", [1, 5, 8])
@pytest.mark.parametrize("chunks", [[FAR], [30] + [1] * 10, [7, 26, 7]], ids=str)
def test_cropping_commutes_with_recomputation(model, removed, chunks):
    ids, mask = padded_batch()
    other, _ = padded_batch(seed=9)
    cache = filled(model, ids[:, :FAR], mask[:, :FAR], chunks=chunks)
    cache.crop(-removed)
    held = FAR - removed
    assert cache.get_seq_length() == held
    check_continuation(model, cache, torch.cat([ids[:, :held], other[:, held:]], 1), mask, held)


def test_cropping_to_a_length_is_the_older_meaning(model):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    cache.crop(FAR - 3)
    assert cache.get_seq_length() == FAR - 3
    check_continuation(model, cache, ids, mask, FAR - 3)


@pytest.mark.parametrize("twice", [False, True])
def test_cropping_beyond_the_slack_is_refused(model, twice):
    ids, mask = padded_batch()
    cache = filled(model, ids, mask, crop_slack=4)
    if twice:
        cache.crop(-3)
    with pytest.raises(RTPurboError, match="at most 4 tokens"):
        cache.crop(-4 if twice else -6)


def test_a_refused_crop_changes_nothing(model):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR], crop_slack=0)
    with pytest.raises(RTPurboError, match="crop_slack"):
        cache.crop(-10)
    check_continuation(model, cache, ids, mask, FAR)


def test_a_window_of_transformers_that_cannot_be_cropped_is_refused():
    model, (ids, mask) = sparse_model(family="gemma3_text"), padded_batch()
    cache = filled(model, ids, mask, crop_slack=LENGTH)
    with pytest.raises(RTPurboError, match="cannot take tokens back: read the remaining ones"):
        cache.crop(-3)


def test_any_crop_works_before_the_ring_wraps():
    model, (ids, mask) = sparse_model(sliding_window=LENGTH), padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR], crop_slack=0)
    cache.crop(-(FAR - 14))
    check_continuation(model, cache, ids, mask, 14)


@pytest.mark.parametrize("emptied", ["reset", "crop"])
def test_an_emptied_cache_starts_anew(model, emptied):
    ids, mask = padded_batch()
    cache = filled(model, ids, mask)
    cache.crop(-LENGTH) if emptied == "crop" else cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.num_bytes() == 0
    check_continuation(model, cache, ids[:2], mask[:2], 0)


def test_offloading_keeps_the_contents(model):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    check_continuation(model, cache, ids, mask, FAR)


def test_masks_cover_every_visible_token(model):
    ids, mask = padded_batch()
    cache = filled(model, ids, mask)
    assert cache.get_mask_sizes(3, 0) == (LENGTH + 3, 0)
    assert cache.get_max_length() == -1
    assert not any(cache.is_sliding)


def test_windowed_layers_keep_their_own_cache():
    model, (ids, mask) = sparse_model("gemma3_text"), padded_batch(PADDING)
    cache = filled(model, ids, mask)
    assert [isinstance(layer, HeadwiseLayer) for layer in cache.layers] == [False, True, False]
    own = [tensor for layer in cache.layers[::2] for tensor in (layer.keys, layer.values)]
    common = [cache.slots.first_slots, cache.slots.ring.positions]
    expected = sum(tensor.nbytes for tensor in [*own, *common])
    expected += sum(tensor.nbytes for _, _, tensor in cache.layers[1].held_tensors())
    assert cache.num_bytes() == expected > 0


def test_other_models_cannot_fill_it(model):
    with pytest.raises(RTPurboError, match="made sparse"):
        tiny_model()(torch.ones(1, 3, dtype=torch.int64), past_key_values=HeadwiseCache(model))


def test_a_dense_model_gets_none():
    with pytest.raises(RTPurboError, match="sparse model"):
        HeadwiseCache(tiny_model())


@pytest.mark.parametrize("change", [{"sliding_window": 9}, {"num_sink_tokens": 3}])
def test_a_cache_made_for_less_refuses_a_wider_rule(model, change):
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    with runtime(model).rule(**change), pytest.raises(RTPurboError, match="make a new cache"):
        logits_of(model, ids[:, FAR:], mask, [LENGTH - FAR], cache)


def test_a_cache_serves_a_narrower_rule():
    # In one layer, keys and values do not depend on the rule under which they were computed.
    model = tiny_model(num_hidden_layers=1).to(torch.float64)
    make_sparse(model, sparse_config(model, prefill_mode="top_p", top_p=0.6, block_size=4))
    ids, mask = padded_batch()
    cache = filled(model, ids[:, :FAR], mask[:, :FAR])
    wide = logits_of(model, ids, mask)[:, FAR:]
    with runtime(model).rule(sliding_window=5):
        assert not torch.allclose(wide, logits_of(model, ids, mask)[:, FAR:])
        check_continuation(model, cache, ids, mask, FAR)
