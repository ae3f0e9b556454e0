"""Heavy hitters, computed key by key, and where they are stored."""

import math
from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.ops.eager.heavy_hitters import (
    NEIGHBOURS,
    OBSERVED_QUERIES,
    attention_after_prompts,
    heavy_hitters,
)
from rtpurbo.ops.eager.local import local_attention
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from tests.oracles import with_heavy_hitters

LENGTH, DIM = 90, 8
RULE = AttentionRule(
    num_sink_tokens=12, sliding_window=16, block_size=8, dense_prompt_queries=32, num_heavy_hitters=10
)  # fmt: skip
SCALING = DIM**-0.5


def inputs(padding=(0, 7), length=LENGTH, heads=6, kv_heads=3):
    torch.manual_seed(3)
    positions = torch.arange(length).expand(2, length) - torch.tensor(padding)[:, None]
    queries = torch.randn(2, heads, length, DIM)
    keys, values = (2 * torch.randn(2, kv_heads, length, DIM) for _ in range(2))
    states = KeyValueStates(keys, values, positions.clamp(min=-1))
    return queries, positions.clamp(min=-1), states


def expected(queries, states, sequence, kv_head, rule=RULE):
    """Indices of the tokens with the largest attention among those that leave the window, key by key."""
    positions = states.positions[sequence].tolist()
    group = queries.shape[1] // states.keys.shape[1]
    mass = []
    for head in range(kv_head * group, (kv_head + 1) * group):
        of_head = [0.0] * len(positions)
        for query in range(len(positions) - OBSERVED_QUERIES, len(positions)):
            visible = [key for key in range(query + 1) if positions[key] >= 0]
            if not visible or positions[query] < 0:
                continue
            logits = [
                float(queries[sequence, head, query] @ states.keys[sequence, kv_head, key])
                * SCALING
                for key in visible
            ]
            total = sum(math.exp(logit) for logit in logits)
            for key, logit in zip(visible, logits, strict=True):
                of_head[key] += math.exp(logit) / total
        mass.append(of_head)
    largest = [max(of_head[key] for of_head in mass) for key in range(len(positions))]
    pooled = [
        max(largest[max(0, key - NEIGHBOURS) : key + NEIGHBOURS + 1])
        for key in range(len(positions))
    ]
    first, end = rule.num_sink_tokens - rule.num_heavy_hitters, max(positions) + 1
    leaving = [
        key for key, position in enumerate(positions)
        if first <= position <= end - rule.sliding_window
    ]  # fmt: skip
    return pooled, sorted(leaving, key=lambda key: -pooled[key])[: rule.num_heavy_hitters]


@pytest.mark.parametrize("padding", [(0, 0), (0, 7), (40, 3)])
def test_they_are_the_tokens_with_most_attention_of_the_last_queries(padding):
    queries, positions, states = inputs(padding)
    found = heavy_hitters(queries, positions, states, RULE, scaling=SCALING)
    for sequence in range(2):
        for kv_head in range(3):
            pooled, wanted = expected(queries, states, sequence, kv_head)
            # Pooled neighbours are equal, so compare their attention.
            masses = [pooled[key] for key in found[sequence, kv_head].tolist()]
            assert sorted(masses) == pytest.approx(sorted(pooled[key] for key in wanted), rel=1e-4)
            assert len(set(found[sequence, kv_head].tolist())) == RULE.num_heavy_hitters


def test_a_sequence_whose_tokens_are_all_held_keeps_its_sinks():
    # 30 tokens: 13 leave a window of 16 counted from the next query, and 3 of these are sinks before the places.
    queries, positions, states = inputs((0, 66))
    found = heavy_hitters(queries, positions, states, RULE, scaling=SCALING)
    assert (found[0] >= 0).all()
    assert (found[1] == -1).all()


@pytest.mark.parametrize("heavy", [10, 0])
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 6)])
def test_each_answer_reads_the_heavy_hitters_of_its_own_prompt(heavy, before, sinks):
    """As from a cache whose last sinks were replaced, for prompts with enough tokens and without."""
    rule = replace(RULE, num_heavy_hitters=heavy)
    queries, positions, states = inputs((0, 40))
    # Keys of earlier tokens, without queries.
    queries, positions = queries[:, :, before:], positions[:, before:]
    group = HeadLayout.build((), 6, 3, torch.device("cpu")).local_windowed
    # Of the second sequence, only the last prompt is long enough to lose tokens.
    spans = [(66 - before, 70 - before), (72 - before, 73 - before), (80 - before, 90 - before)]
    found = attention_after_prompts(
        queries, positions, states, group, spans, rule, scaling=SCALING, sinks=sinks
    )
    for span, part in zip(spans, found.split([4, 1, 10], 2), strict=True):
        read = states.tokens(slice(0, span[1] + before))
        if heavy:
            until = slice(0, span[0])
            prompt = states.tokens(slice(0, span[0] + before))
            slots = heavy_hitters(
                queries[:, :, until], positions[:, until], prompt, rule, scaling=SCALING
            )
            read = with_heavy_hitters(read, slots, rule)
        rows = slice(*span)
        wanted, log_sum_exp = local_attention(
            queries[:, :, rows], positions[:, rows], read, group.key_value_heads,
            sliding_window=16, num_sink_tokens=12, scaling=SCALING, return_log_sum_exp=True,
        )  # fmt: skip
        if sinks is not None:
            wanted, _ = with_sinks(wanted, log_sum_exp, sinks)
        torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heavy_hitters": 5}, "raise num_sink_tokens"),
        ({"num_heavy_hitters": -1}, "num_heavy_hitters is -1"),
        ({"num_heavy_hitters": 2, "dense_prompt_queries": 0}, "needs dense_prompt_tokens or"),
    ],
)
def test_rules_that_cannot_hold_them_are_refused(changes, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        AttentionRule(**{"dense_prompt_queries": 4} | changes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("answer", [1, 2, 3, 5])
def test_answers_have_finite_gradients_in_bf16(answer, device):
    """cuDNN's masked attention has none for some answers of few queries (docs/experiment-log.md)."""
    torch.manual_seed(0)
    length, heads, kv_heads = 600 + answer, 14, 2
    states = [
        (8 * torch.randn(1, count, length, 64, device=device)).bfloat16().requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    positions = torch.arange(length, device=device)[None]
    layout = HeadLayout.build((), heads, kv_heads, torch.device(device))
    output = attention_after_prompts(
        states[0],
        positions,
        KeyValueStates(*states[1:], positions),
        layout.local_windowed,
        [(600, length)],
        replace(RULE, sliding_window=200),
        scaling=1.0,
    )
    output.float().square().sum().backward()
    assert all(state.grad.isfinite().all() for state in states)
