"""Kernels over pages against the readable operators, in memory laid out as vLLM lays it out."""

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch

from rtpurbo.config import AttentionRule, Reading
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.triton.decode.workspace import zero_histograms
from rtpurbo.serving.vllm import cuda, eager
from rtpurbo.serving.vllm.layout import heavy_hitter_blocks
from rtpurbo.serving.vllm.pages import Batch, LayerCache, Part, divide
from tests.ops.triton.support import DEVICE, DTYPES, EPSILON

pytestmark = pytest.mark.kernels

INDEX_DIM = 16
SINKS, WINDOW = 4, 16
BLOCK_SIZES = {"full": 32, "windowed": 16}
# Heads 1 and 2 share a KV head with local ones, and KV head 1 is windowed.
HEADS, KEY_VALUE_HEADS, RETRIEVAL = 6, 3, (1, 4, 5)
# Layers before the one that is looked at, so that its parts begin at odd places.
LAYERS = 3


class Step:
    """A step of an engine: requests in the pages of two groups, and what its attention is given.

    All memory without a token of a request is NaN: other blocks, also those that the table still names where a
    request freed its block, and the rest of a last block. Block 0, which belongs to no request, is zeros.

    Args:
        requests: (tokens, rows of this step, tokens of the prompt) of each.
        dtype: of the model.
        rule: of the model.
        retrieval: heads that retrieve.
        head_dim: of a head.
        cache_dtype: of keys and values in the pages; None for that of the model.
        missing: blocks of the windowed group that a reused prefix lacks, as (request, block).
        shared_keys: the retrieval heads of a KV head share one index key.
    """

    def __init__(
        self,
        requests,
        dtype,
        rule,
        retrieval=RETRIEVAL,
        head_dim=16,
        missing=(),
        cache_dtype=None,
        shared_keys=False,
    ):
        self.rule, self.head_dim, self.dtype = rule, head_dim, dtype
        self.shared_keys = shared_keys
        self.layout = HeadLayout.build(retrieval, HEADS, KEY_VALUE_HEADS, DEVICE)
        self.generator = torch.Generator().manual_seed(0)
        self.requests = requests
        self.scaling = head_dim**-0.5
        starts = [0]
        for _, rows, _ in requests:
            starts.append(starts[-1] + rows)
        self.rows = starts[-1]
        self.queries = self.random(self.rows, HEADS, head_dim) * 2
        self.index_queries = None
        if retrieval:
            self.index_queries = torch.zeros(self.rows, len(retrieval), INDEX_DIM, dtype=dtype)
            for head in range(len(retrieval)):
                self.index_queries[:, head, head] = 5
            self.index_queries = self.index_queries.to(DEVICE)
        numbers = list(range(1, 2 + sum(-(-tokens // 16) for tokens, *_ in requests) * 2))
        random.Random(0).shuffle(numbers)
        full_heads = self.layout.full_key_value_heads.numel()
        states = Part(full_heads, head_dim, cache_dtype or dtype)
        index = Part(full_heads if shared_keys else len(retrieval), INDEX_DIM, dtype)
        windowed = Part(KEY_VALUE_HEADS - full_heads, head_dim, cache_dtype or dtype)
        groups = {"full": (states, states, index), "windowed": (windowed, windowed)}
        sizes = {
            name: LAYERS * BLOCK_SIZES[name] * sum(part.token_bytes for part in parts)
            for name, parts in groups.items()
        }
        stride = max(sizes.values())
        freed = len(numbers) + 1
        memory = torch.full(((len(numbers) + 2) * stride,), -1, dtype=torch.int8, device=DEVICE)
        memory[:stride] = 0
        self.caches = {}
        for name, parts in groups.items():
            if not parts[0].heads:
                self.caches[name] = None
                continue
            size = BLOCK_SIZES[name]
            shape = (memory.numel() // stride, 1, size, sizes[name] // size)
            strides = (stride, sizes[name], sizes[name] // size, 1)
            blocks = torch.as_strided(memory, shape, strides).view(dtype)
            pages = divide(blocks, dict.fromkeys(range(LAYERS), parts))[LAYERS - 1]
            longest = max(-(-tokens // size) for tokens, *_ in requests)
            table = torch.full((len(requests), longest), freed, dtype=torch.int32)
            for request, (tokens, rows, prompt) in enumerate(requests):
                kept = self.kept_tokens(name, tokens, rows, prompt, size)
                if name == "windowed":
                    kept = [token for token in kept if (request, token // size) not in missing]
                    for number in (block for of, block in missing if of == request):
                        table[request, number] = 0
                for number in {token // size for token in kept}:
                    table[request, number] = numbers.pop()
                self.fill(pages, table[request], kept)
            batch = Batch(
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor([tokens for tokens, *_ in requests], dtype=torch.int32),
                torch.tensor([prompt for *_, prompt in requests], dtype=torch.int32),
                table.to(DEVICE),
                torch.empty(0, dtype=torch.int64, device=DEVICE),
                self.on_device([tokens for tokens, *_ in requests]),
                self.on_device([prompt for *_, prompt in requests]),
            )
            self.caches[name] = LayerCache(pages, batch)
        if rule.num_heavy_hitters:
            self.add_own_blocks(numbers)

    def add_own_blocks(self, numbers):
        """Blocks for heavy hitters, which requests that generate have chosen before."""
        rule, cache = self.rule, self.caches["windowed"]
        size = cache.pages.block_size
        count = len(heavy_hitter_blocks(rule.num_sink_tokens, rule.num_heavy_hitters, size))
        own = torch.tensor(
            [[numbers.pop() for _ in range(count)] for _ in self.requests], dtype=torch.int32
        )
        for blocks, (tokens, rows, prompt) in zip(own, self.requests, strict=True):
            if tokens - rows >= prompt:
                self.fill(cache.pages, blocks, range(count * size))
        self.caches["windowed"] = replace(cache, own_blocks=own.to(DEVICE), is_first=True)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype).to(DEVICE)

    def on_device(self, numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    def kept_tokens(self, name, tokens, rows, prompt, size):
        """Tokens whose blocks a request holds."""
        reads_prompt = self.rule.has_dense_queries and tokens - rows < prompt
        if name == "full" or reads_prompt:
            return range(tokens)
        first = max(0, tokens - rows - self.rule.sliding_window + 1) // size * size
        sinks = -(-self.rule.num_sink_tokens // size) * size
        return [token for token in range(tokens) if token < sinks or token >= first]

    def fill(self, pages, table, kept):
        kept = torch.tensor(list(kept), dtype=torch.int64)
        size = pages.block_size
        slots = (table[kept // size].long() * size + kept % size).to(DEVICE)
        shape = (len(kept), pages.keys.shape[1], self.head_dim)
        index = None
        if pages.index_keys is not None:
            heads = pages.index_keys.shape[1]
            index = torch.zeros(len(kept), heads, INDEX_DIM, dtype=self.dtype)
            ranks = range(len(self.layout.retrieval))
            of_ranks = self.layout.retrieval.key_value_heads.tolist() if self.shared_keys else ranks
            for rank, head in zip(ranks, of_ranks, strict=True):
                index[:, head, rank] = -4
            for rank, head in zip(ranks, of_ranks, strict=True):
                # Every head finds the first far token, and another one if it asks for its neighbour.
                index[kept == SINKS, head, rank] = 4
                index[kept == SINKS + 1, head, (rank + 1) % len(ranks)] = 8
            index = index.to(DEVICE)
        pages.write(slots, self.random(*shape), self.random(*shape), index)

    def uniform_index_queries(self):
        """Index queries as `append` leaves them in a uniform step: zeros for the last query of a prompt."""
        if self.index_queries is None:
            return None
        selects = self.on_device([tokens > prompt for tokens, _, prompt in self.requests])
        return self.index_queries * selects[:, None, None].to(self.index_queries.dtype)

    def attended(self, path, uniform=False, histograms=None, sinks=None, **rule):
        full, windowed = self.caches["full"], self.caches["windowed"]
        full = full and replace(full, histograms=histograms)
        caches = [
            cache and replace(cache, batch=replace(cache.batch, uniform=uniform))
            for cache in (full, windowed)
        ]
        output = torch.full_like(self.queries, torch.nan)
        path.attend(
            self.queries,
            self.uniform_index_queries() if uniform else self.index_queries,
            *caches,
            self.layout,
            replace(self.rule, **rule),
            self.scaling,
            output,
            sinks,
        )
        assert not output.isnan().any()
        return output


def rule_of(window=WINDOW, **options):
    options = {"top_p": 0.9, "min_tokens": 1, "block_size": 16} | options
    return AttentionRule(num_sink_tokens=SINKS, sliding_window=window, **options)


def assert_close(actual, expected):
    # Each path rounds its result, and exponentials differ in the last bits of float32.
    tolerance = 8 * EPSILON[expected.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# (tokens, rows, prompt): generating, just begun, alone in the first block; a prompt in one piece and the
# second chunk of one; rows computed again behind a prompt's end; padding.
MIXED = [(60, 1, 30), (41, 1, 40), (7, 1, 3), (34, 34, 34), (50, 12, 90), (62, 10, 55), (9, 0, 9)]


@pytest.mark.parametrize(
    ("retrieval", "dtype"),
    [
        (RETRIEVAL, DTYPES[0]),
        pytest.param(RETRIEVAL, DTYPES[1], marks=pytest.mark.slow),
        pytest.param((), DTYPES[0], marks=pytest.mark.slow),
        pytest.param(range(HEADS), DTYPES[0], marks=pytest.mark.slow),
    ],
)
def test_mixed_batch(retrieval, dtype):
    step = Step(MIXED, dtype, rule_of(), tuple(retrieval))
    assert_close(step.attended(cuda), step.attended(eager))


def test_shared_index_keys():
    step = Step(MIXED, DTYPES[0], rule_of(), shared_keys=True)
    assert step.caches["full"].pages.index_keys.shape[1] == 2 < len(RETRIEVAL)
    found = step.attended(cuda)
    assert_close(found, step.attended(eager))
    assert (found - step.attended(cuda, top_p=1.0)).abs().max() > 0.02
    step = Step([(60, 1, 30), (40, 1, 40)], DTYPES[0], rule_of(), shared_keys=True)
    assert_close(step.attended(cuda, uniform=True), step.attended(eager))


@pytest.mark.parametrize(
    "dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.slow)], ids=str
)
def test_float8_pages(dtype):
    step = Step(MIXED, dtype, rule_of(dense_prompt_queries=12), cache_dtype=torch.float8_e4m3fn)
    assert step.caches["full"].pages.keys.dtype == torch.float8_e4m3fn
    assert_close(step.attended(cuda), step.attended(eager))
    one_query = [(60, 1, 30), (40, 1, 39), (5, 1, 4)]
    step = Step(one_query, dtype, rule_of(), cache_dtype=torch.float8_e4m3fn)
    assert_close(step.attended(cuda, uniform=True), step.attended(eager))


def test_prompts_up_to_a_length_are_dense():
    step = Step(MIXED, DTYPES[0], rule_of(dense_prompt_tokens=30))
    expected = step.attended(eager)
    assert_close(step.attended(cuda), expected)
    assert not torch.equal(step.attended(eager, dense_prompt_tokens=0), expected)


@pytest.mark.parametrize("prefill_mode", ["dense", pytest.param("top_p", marks=pytest.mark.slow)])
def test_learned_sinks(prefill_mode):
    rule = rule_of(dense_prompt_queries=12, prefill_mode=prefill_mode)
    step = Step(ENDS, DTYPES[0], rule)
    sinks = torch.linspace(-2, 4, HEADS, device=DEVICE, dtype=DTYPES[0])
    expected = step.attended(eager, sinks=sinks)
    assert_close(step.attended(cuda, sinks=sinks), expected)
    assert (expected - step.attended(eager)).abs().amax((0, 2)).min() > 0.01
    step = Step([(60, 1, 30), (40, 1, 40), (5, 1, 4)], DTYPES[0], rule_of())
    assert_close(step.attended(cuda, uniform=True, sinks=sinks), step.attended(eager, sinks=sinks))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0},
        {"reading": "paper"},
        {"retrieval_window": 26},
        {"retrieval_window": 9},
        {"prefill_mode": "top_p"},
        {"granularity": "block", "block_size": 8},
    ],
)
def test_rules(options):
    step = Step([(60, 1, 30), (46, 6, 43), (20, 20, 20)], DTYPES[0], rule_of(**options))
    assert_close(step.attended(cuda), step.attended(eager))


def test_layers_with_a_window_of_their_own():
    """Layers without sinks and retrieval heads."""
    rule = replace(rule_of(window=20), num_sink_tokens=0)
    step = Step(MIXED, DTYPES[0], rule, retrieval=())
    assert_close(step.attended(cuda), step.attended(eager))
    step = Step([(60, 1, 30), (40, 1, 40), (5, 1, 5)], DTYPES[0], rule, retrieval=())
    assert_close(step.attended(cuda, uniform=True), step.attended(eager))


# (tokens, rows, prompt): generating; a whole prompt; the dense queries of a prompt begin in a chunk, or end in it
# before generated tokens that are computed again, or are its last token; none in a chunk; a short prompt; padding.
ENDS = [(60, 1, 30), (90, 34, 90), (80, 12, 85), (62, 10, 55), (40, 1, 40), (50, 8, 90)]
ENDS += [(12, 12, 12), (9, 0, 9)]


@pytest.mark.parametrize(
    ("retrieval", "options"),
    [
        (RETRIEVAL, {}),
        pytest.param(RETRIEVAL, {"prefill_mode": "top_p"}, marks=pytest.mark.slow),
        pytest.param((), {}, marks=pytest.mark.slow),
        pytest.param(range(HEADS), {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "missing", [pytest.param((), marks=pytest.mark.slow), ((1, 1), (2, 1), (2, 2))]
)
def test_dense_queries_at_the_end_of_prompts(missing, retrieval, options):
    rule = rule_of(dense_prompt_queries=12, **options)
    step = Step(ENDS, DTYPES[0], rule, tuple(retrieval), missing=missing)
    found = step.attended(cuda)
    assert_close(found, step.attended(eager))
    windowed = step.attended(cuda, dense_prompt_queries=0)
    rows = torch.arange(len(found))
    # Of the second request the last 12 queries, of the third one the last 7, of the fourth one the first 3.
    dense = (rows >= 23) & (rows < 35) | (rows >= 40) & (rows < 50) | (rows == 57)
    changes = (found - windowed).abs().flatten(1).max(1).values.cpu()
    assert (changes[~dense] == 0).all()
    if len(retrieval) < HEADS:
        assert (changes[dense] > 0).all()


@pytest.mark.slow
def test_the_selection_matters():
    step = Step(MIXED, DTYPES[0], rule_of())
    selected, everything = step.attended(cuda), step.attended(cuda, top_p=1.0)
    generating, prompt = selected[:1] - everything[:1], selected[3:37] - everything[3:37]
    assert generating.abs().max() > 0.02
    assert prompt.abs().max() == 0


@pytest.mark.parametrize(
    ("reading", "min_tokens"),
    [
        ("residual", 8),
        *(pytest.param(reading, 1, marks=pytest.mark.slow) for reading in get_args(Reading)),
    ],
)
def test_uniform_steps_distinguish_prompts_from_answers(reading, min_tokens):
    """The last query of a prompt is dense even alone in a step, although only tensors show the kernels that it is."""
    requests = [(60, 1, 30), (60, 1, 60), (40, 1, 39), (40, 1, 80), (5, 1, 5)]
    step = Step(requests, DTYPES[0], rule_of(reading=reading, min_tokens=min_tokens))
    uniform = step.attended(cuda, uniform=True)
    assert_close(uniform, step.attended(cuda))
    assert_close(uniform[[1, 3, 4]], step.attended(eager, top_p=1.0)[[1, 3, 4]])


@pytest.mark.parametrize("reading", ["residual", "paper"])
def test_a_histogram_workspace_is_zeros_again(reading):
    requests = [(60, 1, 30), (41, 1, 40)]
    step = Step(requests, DTYPES[0], rule_of(reading=reading))
    workspace = zero_histograms(2 * len(requests) * len(RETRIEVAL) + 1, step.queries.device)
    expected = step.attended(cuda, uniform=True)
    assert torch.equal(step.attended(cuda, uniform=True, histograms=workspace), expected)
    assert torch.equal(step.attended(cuda, histograms=workspace), expected)
    assert (workspace == 0).all()
    too_small = workspace[:1]
    assert torch.equal(step.attended(cuda, uniform=True, histograms=too_small), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dense", [0, 512])
def test_long_requests(dense, head_dim, dtype):
    requests = [(20_000, 1, 100), (9_001, 1, 9_000), (1_500, 1_500, 1_500), (6_000, 700, 6_000)]
    requests += [(3_000, 300, 2_900), (64, 1, 10)]
    rule = rule_of(1024, dense_prompt_queries=dense)
    step = Step(requests, dtype, rule, head_dim=head_dim)
    assert_close(step.attended(cuda), step.attended(eager))


@pytest.mark.gpu
@pytest.mark.parametrize("num_heavy_hitters", [0, 3])
def test_a_graph_serves_other_steps(num_heavy_hitters):
    """Captured with one step, replayed with the lengths, tables and prompts of others."""
    rule = rule_of(256, dense_prompt_queries=8, num_heavy_hitters=num_heavy_hitters)
    steps = [
        Step([(900, 1, 400), (500, 1, 500), (2_000, 1, 40)], DTYPES[0], rule),
        Step([(1_900, 1, 1_900), (77, 1, 70), (1_200, 1, 400)], DTYPES[0], rule),
    ]
    held = steps[0]
    longest = {
        name: max(step.caches[name].batch.block_table.shape[1] for step in steps)
        for name in ("full", "windowed")
    }
    for step in steps:
        for name, cache in step.caches.items():
            table = cache.batch.block_table
            table = torch.nn.functional.pad(table, (0, longest[name] - table.shape[1]))
            batch = replace(cache.batch, block_table=table, uniform=True)
            step.caches[name] = replace(cache, batch=batch)
    expected = [step.attended(cuda, uniform=True) for step in steps]
    # The second step's tokens go where the first step's memory is.
    held.attended(cuda, uniform=True)
    graph, output = torch.cuda.CUDAGraph(), torch.empty_like(held.queries)
    index_queries = held.uniform_index_queries()
    arguments = (held.caches["full"], held.caches["windowed"], held.layout, held.rule, held.scaling)
    with torch.cuda.graph(graph):
        cuda.attend(held.queries, index_queries, *arguments, output)
    graph.replay()
    assert_close(output, expected[0])
    other = steps[1]
    held.queries.copy_(other.queries)
    index_queries.copy_(other.uniform_index_queries())
    for name, cache in held.caches.items():
        theirs = other.caches[name]
        cache.batch.block_table.copy_(theirs.batch.block_table)
        cache.batch.device_lengths.copy_(theirs.batch.device_lengths)
        cache.batch.device_prompt_lengths.copy_(theirs.batch.device_prompt_lengths)
        if cache.own_blocks is not None:
            cache.own_blocks.copy_(theirs.own_blocks)
        pages = min(len(cache.pages.keys), len(theirs.pages.keys))
        assert len(theirs.pages.keys) == pages, "the first step must have as many blocks"
        for part in ("keys", "values", "index_keys"):
            mine, others = getattr(cache.pages, part), getattr(theirs.pages, part)
            if mine is not None:
                mine[:pages].copy_(others)
    graph.replay()
    assert_close(output, expected[1])
