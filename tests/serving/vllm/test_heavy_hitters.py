"""Heavy hitters in pages: which queries choose them, where they are stored, and which queries read them."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import KeyValueStates
from rtpurbo.ops.eager.heavy_hitters import heavy_hitters, shortest_prompt
from rtpurbo.serving.vllm import cuda, eager
from rtpurbo.serving.vllm.heavy_hitters import choose_heavy_hitters
from rtpurbo.serving.vllm.pages import Batch
from tests.ops.triton.support import DEVICE, DTYPES
from tests.oracles import with_heavy_hitters
from tests.serving.vllm.test_cuda import Step, assert_close

# The first block of sinks holds others too, the last one other tokens.
RULE = AttentionRule(
    num_sink_tokens=25,
    num_heavy_hitters=14,
    dense_prompt_queries=12,
    sliding_window=80,
    # The index keys of `Step` are of tokens that are sinks here.
    top_p=1.0,
    min_tokens=1,
    block_size=16,
)
# (tokens, rows, prompt), as in `test_cuda`, and how many rows choose.
REQUESTS = {
    (170, 1, 150): 0,
    (150, 70, 150): 64,
    # The end of the prompt in a chunk, before generated tokens that are computed again.
    (140, 50, 130): 40,
    (138, 10, 200): 2,
    # Too short to lose more tokens than it has sinks.
    (100, 30, 100): 0,
    (110, 1, 100): 0,
    (9, 0, 9): 0,
}


def chosen_by(requests):
    starts = torch.tensor([0, *(rows for _, rows, _ in requests)]).cumsum(0).int()
    lengths, _, prompts = (
        torch.tensor(part, dtype=torch.int32) for part in zip(*requests, strict=True)
    )
    nothing = torch.empty(0)
    batch = Batch(starts, lengths, prompts, nothing, nothing, lengths)
    first, count = batch.observed_queries(RULE)
    return list(zip(first.tolist(), count.tolist(), strict=True))


def test_queries_that_choose():
    counts = [count for _, count in chosen_by(list(REQUESTS))]
    assert counts == list(REQUESTS.values())
    assert shortest_prompt(RULE) == 104


@pytest.mark.parametrize(
    ("ends", "chooses"),
    [
        ((150,), [64]),
        ((100, 150), [14, 50]),
        ((140, 150), [54, 0]),
        ((149, 150), [63, 0]),
        ((96, 106, 126, 146, 150), [10, 10, 20, 0, 0]),
    ],
)
def test_queries_that_choose_in_chunks(ends, chooses):
    """The later chunk, unless it has fewer of the last 64 queries than came before it."""
    starts = (0, *ends[:-1])
    requests = [(end, end - start, 150) for start, end in zip(starts, ends, strict=True)]
    found = chosen_by(requests)
    assert [count for _, count in found] == chooses
    for (first, count), (end, *_) in zip(found, requests, strict=True):
        if count:
            assert first + count == end
            assert first >= 150 - 64


@pytest.fixture
def step():
    return Step(list(REQUESTS), DTYPES[0], RULE)


def choose(step):
    choose_heavy_hitters(
        step.queries, step.caches["windowed"], step.layout, step.rule, step.scaling
    )


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_they_replace_sinks_in_a_copy(cache_dtype):
    step = Step(list(REQUESTS), DTYPES[0], RULE, cache_dtype=cache_dtype)
    cache = step.caches["windowed"]
    before = [part.to(step.dtype).clone() for part in (cache.pages.keys, cache.pages.values)]
    choose(step)

    def gathered(part, table):
        return part[table.long()].transpose(0, 1).flatten(1, 2)[None]

    keys, values = (gathered(part, cache.batch.block_table[1])[:, :, :150] for part in before)
    positions = torch.arange(150, device=DEVICE)[None]
    states = KeyValueStates(keys, values, positions)
    queries = step.queries[1:71, step.layout.local_windowed.heads].transpose(0, 1)[None]
    slots = heavy_hitters(queries, positions[:, 80:], states, RULE, scaling=step.scaling)
    assert (slots >= 25).any()
    expected = with_heavy_hitters(states, slots, RULE)
    after = [part.to(step.dtype) for part in (cache.pages.keys, cache.pages.values)]
    for part, wanted in zip(after, (expected.keys, expected.values), strict=True):
        assert torch.equal(gathered(part, cache.own_blocks[1]), wanted[:, :, :32])
    changed = [1, 2, 3]
    others = torch.ones(len(before[0]), dtype=torch.bool)
    others[cache.own_blocks[changed].flatten().long()] = False
    for part, old in zip(after, before, strict=True):
        torch.testing.assert_close(part[others], old[others], rtol=0, atol=0, equal_nan=True)


def test_blocks_that_a_reused_prefix_lacks():
    """They are not chosen; the sinks are always there."""
    missing = tuple((0, block) for block in range(2, 12))
    step = Step([(250, 64, 250)], DTYPES[0], RULE, missing=missing)
    choose(step)
    (own,) = step.caches["windowed"].own_blocks.long()
    held = step.caches["windowed"].pages.keys[own]
    assert not held.isnan().any()
    assert (held != 0).all()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"prefill_mode": "top_p"}, marks=pytest.mark.slow)]
)
def test_a_mixed_batch(step, options):
    step.rule = replace(RULE, **options)
    choose(step)
    found = step.attended(cuda)
    assert_close(found, step.attended(eager))
    step.caches["windowed"] = replace(step.caches["windowed"], own_blocks=None)
    shared = step.attended(cuda)
    changes = (found - shared).abs().flatten(1).max(1).values.cpu()
    rows = torch.arange(len(found))
    # The first request, and the last 10 rows of the third one, follow a prompt with heavy hitters.
    follows = (rows == 0) | (rows >= 111) & (rows < 121)
    assert (changes[follows] > 0).all()
    assert (changes[~follows] == 0).all()


@pytest.mark.kernels
def test_uniform_steps():
    requests = [(170, 1, 150), (110, 1, 110), (120, 1, 100), (160, 1, 104), (5, 1, 5)]
    step = Step(requests, DTYPES[0], RULE)
    found = step.attended(cuda, uniform=True)
    # The last query of a prompt keeps to its window in such a step.
    follows = [0, 2, 3, 4]
    assert_close(found[follows], step.attended(eager)[follows])
    without = replace(step.caches["windowed"], own_blocks=None)
    own, step.caches["windowed"] = step.caches["windowed"], without
    changes = (step.attended(cuda, uniform=True) != found).flatten(1).any(1)
    assert changes.tolist() == [True, False, False, True, False]
    step.caches["windowed"] = own
    # A graph is replayed with other numbers in the same tensors: only device tensors decide.
    batch = replace(step.caches["windowed"].batch, uniform=True)
    step.caches["windowed"] = replace(step.caches["windowed"], batch=batch)
    arguments = (step.caches["full"], step.caches["windowed"], step.layout, step.rule, step.scaling)
    full = replace(step.caches["full"], batch=replace(step.caches["full"].batch, uniform=True))
    outputs = []
    for prompt in (150, 100):
        batch.device_prompt_lengths[0] = prompt
        outputs.append(torch.full_like(step.queries, torch.nan))
        cuda.attend(step.queries, step.index_queries, full, *arguments[1:], outputs[-1])
    assert_close(outputs[0][0], found[0])
    assert not torch.equal(outputs[1][0], outputs[0][0])
    assert torch.equal(outputs[1][3], outputs[0][3])
