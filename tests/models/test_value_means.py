"""Stored block means equal those computed from the values, however the tokens were appended."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.models.value_means import ValueMeans
from rtpurbo.ops.eager.unselected import block_value_means
from tests.models.test_decoding import plain_steps  # noqa: F401
from tests.models.test_fused_kv_append import set_backend
from tests.models.test_slots import Looks, holes, states_seen  # noqa: F401
from tests.ops.triton.support import DEVICE
from tests.tiny_models import (
    PADDING,
    assert_same_logits,
    logits_of,
    padded_batch,
    sparse_model,
)

PROMPT, LENGTH, BLOCK = 20, 60, 8
RULE = {"unselected": "block_means", "block_size": BLOCK}
CHUNKS = [1, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 17, 1, 1, 1]


@pytest.fixture(scope="module")
def model():
    return sparse_model(**RULE)


def check_means(states, block_size=BLOCK):
    """The means of every whole block are those of its values; returns the number of whole blocks."""
    expected = block_value_means(states, block_size, states.value_means.shape[2])
    total = 0
    for sequence, positions in enumerate(states.positions):
        whole = (int(positions.max()) + 1) // block_size
        actual = states.value_means[sequence, :, :whole]
        torch.testing.assert_close(actual, expected[sequence, :, :whole])
        total += whole
    return total


@given(
    padding=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    block_size=st.integers(1, 9),
    on_device=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_every_whole_block_is_written(padding, chunks, block_size, on_device):
    total, length = sum(chunks), 0
    values = torch.randn(len(padding), 2, total + 5, 3, dtype=torch.float64)
    first_slots = torch.tensor(padding, dtype=torch.int32) if any(padding) or on_device else None
    means = ValueMeans(block_size)
    for new in chunks:
        length += new
        filled = values.clone()
        filled[:, :, length:] = torch.nan
        end = torch.tensor([length], dtype=torch.int32) if on_device else length
        storage = means.update(filled, new, end, first_slots)
    for sequence, pad in enumerate(padding):
        for block in range(max(0, total - pad) // block_size):
            start = pad + block * block_size
            mean = values[sequence, :, start : start + block_size].mean(1)
            torch.testing.assert_close(storage[sequence, :, block], mean)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("block_size", "head_dim"), [(1, 8), (6, 24), (16, 512)])
def test_the_kernel_writes_completed_blocks_alone(dtype, block_size, head_dim):
    from rtpurbo.ops.triton.decode.value_means import update_value_means

    capacity, padding = 4 * block_size + 3, [0, 2, 4 * block_size + 3]
    values = torch.randn(3, 2, capacity, head_dim, device=DEVICE).to(dtype)
    num_blocks = capacity // block_size + 1
    first_slots = torch.tensor(padding, dtype=torch.int32, device=DEVICE)
    means = torch.full((3, 2, num_blocks, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    for length in range(1, capacity + 1):
        used = values.clone()
        used[:, :, length:] = torch.nan
        end = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        update_value_means(means, used, end, first_slots, block_size)
    for sequence, pad in enumerate(padding):
        whole = max(0, capacity - pad) // block_size
        blocks = values[sequence, :, pad : pad + whole * block_size].float()
        expected = blocks.unflatten(1, (whole, block_size)).mean(2) if whole else blocks[:, :0]
        torch.testing.assert_close(means[sequence, :, :whole], expected.to(dtype))
        assert means[sequence, :, whole:].isnan().all()


@pytest.mark.parametrize("padding", [(0,), (0, 0), PADDING], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_states_hold_the_means_while_a_cache_grows(model, states_seen, padding, static):  # noqa: F811
    ids, mask = padded_batch(padding, LENGTH)
    cache = HeadwiseCache(model)
    logits, counts, start = [], [], 0
    for size in [7, 1, 12, *CHUNKS]:
        if static and start == PROMPT:
            cache.make_static(48)  # and a larger capacity is taken later
        end = start + size
        logits.append(logits_of(model, ids[:, start:end], mask[:, :end], [size], cache))
        counts += [check_means(full) for _, full, _ in states_seen[-2:]]
        start = end
    assert counts == sorted(counts)
    assert counts[-1] == sum((LENGTH - pad) // BLOCK for pad in padding)
    assert_same_logits(torch.cat(logits, 1), logits_of(model, ids, mask), mask)


@pytest.mark.parametrize("static", [False, True])
def test_means_follow_crops_and_rearranged_sequences(model, states_seen, static):  # noqa: F811
    ids, mask = padded_batch(PADDING, LENGTH)
    other, _ = padded_batch(PADDING, LENGTH, seed=9)
    cache = HeadwiseCache(model, crop_slack=16)
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    if static:
        cache.make_static(128)
    logits_of(model, ids[:, PROMPT:40], mask[:, :40], [1] * 20, cache)
    cache.crop(-11)
    ids = torch.cat([ids[:, :29], other[:, 29:]], 1)
    logits_of(model, ids[:, 29:44], mask[:, :44], [1] * 13 + [2], cache)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 3, 4, 5])
    cache.batch_select_indices(rows)
    ids, mask = (part[order].repeat_interleave(2, 0)[rows] for part in (ids, mask))
    logits_of(model, ids[:, 44:], mask, [1] * 16, cache)
    assert [check_means(full) for _, full, _ in states_seen[-2:]] == [26] * 2


def test_a_step_needs_no_synchronisation(model):
    ids, mask = padded_batch(PADDING, LENGTH)
    cache = HeadwiseCache(model)
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    cache.make_static(128)
    layer = cache.layers[0]
    values, slots = layer.full_values.storage, cache.slots
    with Looks() as looks:
        layer.value_means.update(values, 1, slots.length, slots.first_slots)
    assert looks.count == 0


def test_replayed_steps_keep_the_means(model, states_seen, plain_steps):  # noqa: F811
    ids, mask = padded_batch(PADDING, LENGTH)
    cache = HeadwiseCache(model)
    cache.expected_length = LENGTH
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    decoded = logits_of(model, ids[:, PROMPT:], mask, [1] * (LENGTH - PROMPT), cache)
    assert plain_steps.runs == LENGTH - PROMPT
    assert plain_steps.prepared == 1
    check_means(states_seen[-1][1])
    assert_same_logits(decoded, logits_of(model, ids, mask)[:, PROMPT:], mask)


def test_padding_between_tokens_has_no_blocks_in_order(model, states_seen):  # noqa: F811
    ids, mask = padded_batch((0, 0), LENGTH)
    mask = holes(mask)
    cache = HeadwiseCache(model)
    logits_of(model, ids, mask, [PROMPT, 1, LENGTH - PROMPT - 1], cache)
    assert states_seen[-1][1].value_means is None


def test_size_in_bytes(model):
    ids, mask = padded_batch((0,), LENGTH)
    sizes = []
    for unselected in ("dropped", "block_means"):
        with runtime(model).rule(unselected=unselected):
            cache = HeadwiseCache(model)
            logits_of(model, ids, mask, [LENGTH], cache)
            assert cache.num_bytes() == cache_bytes(model, LENGTH)
            sizes.append(cache.num_bytes())
    means = [layer.value_means.storage for layer in cache.layers]
    assert [tuple(each.shape) for each in means] == [(1, 2, -(-LENGTH // BLOCK), 8)] * 2
    assert sizes[1] - sizes[0] == sum(each.nbytes for each in means)


def test_other_block_sizes_need_another_cache(model):
    ids, mask = padded_batch((0,), LENGTH)
    cache = HeadwiseCache(model)
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    with (
        runtime(model).rule(block_size=4),
        pytest.raises(RTPurboError, match="means of blocks of 8"),
    ):
        logits_of(model, ids[:, PROMPT:], mask, [LENGTH - PROMPT], cache)


def test_an_emptied_cache_starts_anew(model, states_seen):  # noqa: F811
    ids, mask = padded_batch(PADDING, LENGTH)
    cache = HeadwiseCache(model)
    logits_of(model, ids, mask, [LENGTH], cache)
    cache.reset()
    states_seen.clear()
    logits_of(model, ids[:, :30], mask[:, :30], [17, 1, 1, 11], cache)
    assert states_seen[-1][1].value_means.shape[2] == 4
    check_means(states_seen[-1][1])


@pytest.mark.kernels
@pytest.mark.parametrize("static", [False, True])
def test_kernels_with_stored_means(states_seen, static, monkeypatch):  # noqa: F811
    """Steps by kernels equal those that compute all means, and the eager ones up to quantised masses."""
    # The interpreter runs programs one after the other.
    monkeypatch.setattr("rtpurbo.ops.triton.decode.unselected.UNSELECTED_SPLITS", 1)
    # Few keys are selected, so that kernels select none in addition, which matters under a random index.
    model = sparse_model("qwen3", dtype=torch.float32, top_p=0.05, **RULE).to(DEVICE)
    model.rtpurbo_graphs = False
    ids, mask = (part.to(DEVICE) for part in padded_batch((0, 3), 26))
    steps = []
    for backend, stored in (("triton", True), ("triton", False), ("eager", True)):
        cache = HeadwiseCache(model)
        set_backend(model, "eager")
        logits_of(model, ids[:, :22], mask[:, :22], [22], cache)
        if static:
            cache.make_static(64)
        set_backend(model, backend)
        for layer in cache.layers:
            layer.value_means = layer.value_means if stored else None
        steps.append(logits_of(model, ids[:, 22:], mask, [1] * 4, cache))
        if stored:
            check_means(states_seen[-1][1])
        assert {module.used_backend for module in headwise_modules(model)} == {backend}
    assert_same_logits(steps[0], steps[1], mask)
    assert_same_logits(steps[0], steps[2], mask, tolerance=0.05)
